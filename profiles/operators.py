"""Where a run's time goes: every backend's own profiler in one table, by module, kind of work and kernel.

| backend | who tells | how a kernel finds its module |
|---|---|---|
| eager | torch.profiler | hooks mark each module's forward |
| torch.compile, AOTInductor | torch.profiler, kernels compiled with their names | the generated code's own comments |
| ONNX Runtime | its session profile | the nodes' names, which are ours, in the graph as it was optimized |
| TensorRT | the times of its layers | the ONNX nodes in the layers' metadata |

Profilers cost time. What they report is the profiled run; the same run without a profiler stands in `how`.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .schema import Breakdown, OperatorTime

if TYPE_CHECKING:
    from optimize.compile.runners import Bound, Feeds, Runner

    from .work import GraphWork

WARM, RUNS = 2, 10


@dataclass(frozen=True)
class Piece:
    """A kernel, or an operator whose kernels are not told apart, in one run: `ms` of it."""

    module: str
    operator: str
    kernel: str
    ms: float
    provider: str = ""


@dataclass(frozen=True)
class Run:
    """One profiled run: `ms` from its start to its end, of which the pieces are a part."""

    ms: float
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class Profiled:
    """What a backend's profiler gives: warm runs, its name, a trace (a file), and the same run without it, in ms."""

    runs: Sequence[Run]
    profiler: str
    unprofiled_ms: float
    trace: Path | None = None


def breakdown_of(
    runner: Runner,
    feeds: Feeds,
    *,
    component: str,
    shape: str,
    backend: str,
    precision: str,
    folder: Path | None = None,
    work: GraphWork | None = None,
    runs: int = RUNS,
) -> Breakdown:
    """Profiles a runner that has not been entered yet: it is entered here, prepared for its profiler.

    Args:
        feeds: as for `infer`.
        folder: where the Chrome trace is written; without one there is none.
        work: the counts of the same graph at the same sizes; operations and bytes are put beside the times.
        runs: profiled runs. The faster half of them is averaged, so that a busy neighbour counts little.

    Raises MissingError for a runner that has no profiler here.
    """
    name = f"{component}.{shape}.{backend}.{precision}".replace("/", "_").replace(" ", "_")
    trace = None if folder is None else folder / f"{name}.trace.json"
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
    found = profiled(runner, feeds, runs, trace)
    best = sorted(found.runs, key=lambda r: r.ms)[: max(1, len(found.runs) // 2)]
    run_ms = statistics.fmean(r.ms for r in best)
    operators = table([r.pieces for r in best], work)
    return Breakdown(
        component=component,
        shape=shape,
        backend=backend,
        precision=precision,
        run_ms=run_ms,
        outside_ms=run_ms - sum(o.ms for o in operators),
        operators=operators,
        how=how(found, run_ms),
        trace=found.trace.name if found.trace else None,
    )


MUCH = 0.25


def how(found: Profiled, run_ms: float) -> str:
    extra = run_ms / found.unprofiled_ms - 1
    words = (
        f"{found.profiler}; the mean of the faster half of {len(found.runs)} warm runs; the profiled run takes "
        f"{extra:+.0%} beside {found.unprofiled_ms:.3f} ms without a profiler"
    )
    if extra > MUCH:
        words += ", whose cost per kernel weighs on short kernels and on the time outside of them"
    return words


def profiled(runner: Runner, feeds: Feeds, runs: int, trace: Path | None) -> Profiled:
    from optimize.compile.runners import OnnxRuntimeRunner

    if isinstance(runner, OnnxRuntimeRunner):
        from .ort_profile import profile_session

        return profile_session(runner, feeds, runs, trace)
    from optimize.compile.engine_runner import EngineRunner

    if isinstance(runner, EngineRunner):
        from .engine_profile import profile_engine

        return profile_engine(runner, feeds, runs, trace)
    from .torch_profile import profile_torch

    return profile_torch(runner, feeds, runs, trace)


def table(runs: Sequence[Iterable[Piece]], work: GraphWork | None = None) -> list[OperatorTime]:
    """Pieces of several runs as rows, the longest first: milliseconds and calls of one run."""
    ms: dict[tuple[str, str, str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str, str, str], int] = defaultdict(int)
    for pieces in runs:
        for p in pieces:
            key = (p.module, p.operator, p.kernel, p.provider)
            ms[key] += p.ms / len(runs)
            calls[key] += 1
    counted = counts_of(work)
    rows = []
    for key in sorted(ms, key=lambda k: -ms[k]):
        module, operator, kernel, provider = key
        flops, moved = counted.pop((module, operator), (None, None))  # once, to the longest of its kernels
        rows.append(
            OperatorTime(
                module=module,
                operator=operator,
                kernel=kernel,
                ms=ms[key],
                calls=calls[key] / len(runs),
                provider=provider,
                flops=flops,
                bytes=moved,
            )
        )
    return rows


def counts_of(work: GraphWork | None) -> dict[tuple[str, str], tuple[float | None, float | None]]:
    """(module, kind) -> operations and unfused bytes."""
    found: dict[tuple[str, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for n in work.nodes if work is not None else ():
        flops, moved = found[n.module, n.operator]
        found[n.module, n.operator] = flops + n.flops, moved + n.bytes
    return dict(found)


def by_module(breakdown: Breakdown, depth: int = 2) -> list[tuple[str, float]]:
    """Milliseconds by block, the longest first: `depth` names of the path, not counting numbers."""
    found: dict[str, float] = defaultdict(float)
    for row in breakdown.operators:
        found[block_of(row.module, depth)] += row.ms
    return sorted(found.items(), key=lambda item: -item[1])


def block_of(module: str, depth: int) -> str:
    """`down_blocks.0.resnets.1.conv1` at depth 1 is `down_blocks.0`, at depth 2 `down_blocks.0.resnets.1`."""
    kept, names = [], 0
    for part in module.split("."):
        names += not part.isdigit()
        if names > depth:
            break
        kept.append(part)
    return ".".join(kept)


def wait_for(device: str) -> Callable[[], Any]:
    """Until a GPU has done what it was given; nothing on a CPU."""
    import torch

    return torch.cuda.synchronize if device != "cpu" else lambda: None


def median_ms(run: Bound | Callable[[], Any], runs: int, wait: Callable[[], Any] = lambda: None) -> float:
    """The median of some runs on a plain clock; `wait` until a GPU is done."""
    times = []
    for _ in range(WARM + runs):
        before = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - before)
    return statistics.median(times[WARM:]) * 1e3
