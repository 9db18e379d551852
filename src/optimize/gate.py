"""The gate: an ONNX artifact is compared with eager before a bundle claims it, and again when somebody verifies it."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optimize.compile.records import Parity
from optimize.compile.spec import Component
from optimize.errors import GateError, OptimizeError

if TYPE_CHECKING:
    from optimize.profiles.parity import Reference

SEGMENT_BYTES = 32 << 20  # ONNX Runtime holds a segment several times while it loads it; smaller ones cost no time
BF16_EMULATED = (
    "bf16 emulated: ONNX Runtime's CPU provider has no bf16 kernels; every node is computed in fp32 and rounded"
)


@dataclass(frozen=True)
class Plan:
    """How a component is compared on this machine: whole, or streamed (eager) and in segments (ONNX)."""

    streamed: bool
    segment_bytes: int = SEGMENT_BYTES


def plan_for(component: Component, memory: int | None = None) -> Plan:
    """Whole where twice the fp32 weights fit into half of the memory that is free now (or `memory`, in bytes)."""
    module = component.build()
    weights = 4 * sum(p.numel() for p in module.parameters())
    free = available_bytes() if memory is None else memory
    return Plan(streamed=2 * weights > free / 2)


def available_bytes() -> int:
    """Memory that is free now, in bytes."""
    import psutil

    return int(psutil.virtual_memory().available)


def parity_of_onnx(
    path: Path, component: Component, precision: str, plan: Plan, say: Callable[[str], None], *, islands: bool = False
) -> Parity:
    """Runs eager, then the graph in ONNX Runtime on the CPU, and compares; a miss by a hair is drawn more often.

    `islands`: parts of an fp16 graph are in fp32, and eager is given fp32's range.
    """
    from optimize.profiles import parity

    result = parity_by_draws(path, component, precision, plan, say, parity.FEW_DRAWS, islands)
    if not result.passed and parity.marginal(result):
        result = parity_by_draws(path, component, precision, plan, say, parity.MANY_DRAWS, islands)
    return result


def parity_by_draws(
    path: Path,
    component: Component,
    precision: str,
    plan: Plan,
    say: Callable[[str], None],
    draws: int,
    islands: bool = False,
) -> Parity:
    """One comparison with up to `draws` sets of feeds at each set of sizes."""
    import onnx_ir as ir

    from optimize.compile import segments
    from optimize.compile.emulate import emulated
    from optimize.compile.runners import OnnxRuntimeRunner, native_library, uses_kernels
    from optimize.profiles import parity

    known = parity.references(component, precision, streamed=plan.streamed, say=say, draws=draws, wide=islands)
    check_references(component, known)
    feeds: list[Mapping[str, torch.Tensor]] = [r.feeds for r in known]
    compared = partial(parity.parity_of, component=component, precision=precision, known=known, wide=islands)
    cut = segments.segments_of(ir.load(path), plan.segment_bytes if plan.streamed else 1 << 62)
    how = f"{len(cut)} segments" if len(cut) > 1 else "whole"
    rounded = partial(emulated, precision=precision)
    notes = []
    say("ONNX Runtime")
    with refusals(path):
        if precision == "bf16":
            outputs = segments.run_segments(path, cut, [parity.widened(f) for f in feeds], rounded)
            notes.append(BF16_EMULATED)
        elif plan.streamed:
            outputs = segments.run_segments(path, cut, feeds)
        else:
            how = "whole"
            with OnnxRuntimeRunner(path, native=False) as runner:
                outputs = [runner.infer(f) for f in feeds]
            if uses_kernels(path) and native_library() is not None:
                say("ONNX Runtime with the native library")
                with OnnxRuntimeRunner(path, native=True) as runner:
                    by_library = [runner.infer(f) for f in feeds]
                again = compared(by_library, backend="onnxruntime CPU with the native library")
                if not again.passed:
                    return again
                notes.append(f"by the functions' bodies; with the native library too: {again.worst:.1e}")
        if islands:  # of fp16 ONNX Runtime's CPU provider computes much in fp32: an overflow can hide there
            say("ONNX Runtime, every value rounded")
            stored = segments.run_segments(path, cut, [parity.widened(f) for f in feeds], rounded)
            again = compared(stored, backend="onnxruntime CPU, every fp16 value rounded to fp16", how=how)
            if not again.passed:
                return again
            notes.append(f"with every fp16 value rounded to fp16, as a GPU stores it, too: {again.worst:.1e}")
    return compared(outputs, backend="onnxruntime CPU", how=how, notes=notes)


def check_references(component: Component, known: Iterable[Reference]) -> None:
    """Raises GateError where eager fp32 itself gives NaN: it can prove nothing, and the graph is not to blame."""
    for reference in known:
        names = [name for name, tensor in reference.exact.items() if tensor.isnan().any()]
        if names:
            raise GateError(
                f"{component.name}: eager fp32 itself gives values that are no numbers",
                got=f"NaN in {', '.join(names)} at {dict(reference.sizes)}",
                expected="a reference to prove by",
                mend="look for NaN in the weights: they may be damaged, or have overflowed in training",
            )


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """A graph that the checker or ONNX Runtime refuses has not passed the gate."""
    try:
        yield
    except (OptimizeError, MemoryError):
        raise
    except Exception as e:
        module = type(e).__module__
        if not module.startswith("onnx"):
            raise
        raise GateError(
            f"{path.name} is refused by {module.partition('.')[0]}",
            got=" ".join(str(e).split())[:400],
            expected="a graph that loads and runs",
            mend="export again; if it stays, report the text",
        ) from e


def miss(
    path: Path,
    component: Component,
    precision: str,
    result: Parity,
    kept: Path,
    say: Callable[[str], None],
    *,
    islands: bool = False,
) -> GateError:
    """The error for a missed gate: the worst output, the first node that departs, and how to see it again.

    The graph, its feeds and the reference are kept in `kept`.
    """
    from optimize.profiles import bisect, parity

    if precision == "fp16" and any(math.isinf(o.eager or 0.0) for s in result.shapes for o in s.outputs):
        return overflow(path, component, say)

    shape, output = parity.worst_miss(result, precision)
    limit = parity.FP32_LIMIT if precision == "fp32" else parity.EAGER_FACTOR * (output.eager or math.nan)
    say("looking for the first node that departs")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for file in path.parent.iterdir():
        shutil.move(str(file), kept / file.name)
    moved = kept / path.name
    sizes = dict(shape.sizes)
    with contextlib.redirect_stdout(io.StringIO()):  # polygraphy's logger writes there whatever its severity
        command = bisect.write_reproduction(moved, component, precision, sizes, kept)
    return GateError(
        f"parity missed: {component.name} {precision}, output {output.name} at the {shape.name} sizes "
        f"({', '.join(f'{k}={v}' for k, v in shape.sizes.items())})",
        got=f"relative error {output.relative:.3g}, largest difference {output.worst:.3g} of the largest value"
        + ("" if output.finite else ", with values that are not finite")
        + (f"; eager {precision} itself: {output.eager:.3g}" if output.eager is not None else ""),
        expected=f"{result.rule} ({limit:.3g} here)",
        mend=f"first node that departs: {bisect.first_departure(moved, component, precision, sizes, wide=islands)}\n"
        f"  reproduce: {command}",
    )


def overflow(path: Path, component: Component, say: Callable[[str], None]) -> GateError:
    """The error where eager fp16 itself gives infinities: the first tensor that does not fit."""
    from optimize.quantize.probe import LARGEST, parity_feeds, probe_graph

    seen = probe_graph(path, parity_feeds(component), SEGMENT_BYTES, say)
    name = seen.first_overflow
    return GateError(
        f"{component.name} overflows in fp16: eager itself gives values that are not finite",
        got=f"{name} reaches {seen.ranges[name].largest:.4g}" if name else "weights that fp16 cannot hold",
        expected=f"at most {LARGEST:.0f}, fp16's largest number",
        mend="drop --no-probe: what overflows stays in fp32 then; or more --probe-steps, or --keep-fp32 PATTERN",
    )
