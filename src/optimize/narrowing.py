"""A 16-bit graph keeps in fp32 what 16 bits cannot hold: the probe runs, its figures and the user's words decide."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from optimize.compile.onnx_model import Clock
    from optimize.compile.sources import Source
    from optimize.compile.spec import Component
    from optimize.gate import Plan
    from optimize.quantize.islands import Kept
    from optimize.quantize.probe import Probe, Range

NARROWS = ("fp16", "bf16")
STEPS = 4
"""Forward passes of the probe, beside those at parity's own sizes."""
UNPROBED = "not probed (--no-probe): where fp16 overflows on inputs that parity did not draw, nobody knows"
BF16 = "not probed: bf16 has the range of fp32"


@dataclass(frozen=True)
class Words:
    """What the user asked of the 16-bit precisions. `steps` of the probe, 0 for none; `keep` are patterns."""

    steps: int = STEPS
    keep: tuple[str, ...] = ()

    def key(self, precision: str) -> dict[str, str]:
        """What an artifact of that precision depends on, by name."""
        if precision not in NARROWS:
            return {}
        probe = {"probe": f"{self.steps} steps" if self.steps else "none", "prober": prober_digest()}
        return {
            **(probe if precision == "fp16" else {}),
            **({"keep fp32": json.dumps(sorted(self.keep))} if self.keep else {}),
        }

    def notes(self, precision: str) -> list[str]:
        """What the manifest says of how the range was looked after."""
        return [BF16] if precision == "bf16" else [UNPROBED] if precision == "fp16" and not self.steps else []


def words_from(precisions: Sequence[str], keep: Sequence[str], probe_steps: int | None, no_probe: bool) -> Words:
    """Checks `--keep-fp32`, `--probe-steps` and `--no-probe` against one another. Raises InputError."""
    if keep and not set(NARROWS) & set(precisions):
        raise InputError(
            "--keep-fp32 is for fp16 and bf16",
            got=", ".join(precisions),
            expected="one of them among the precisions",
            mend="--precision fp16, or leave out --keep-fp32",
        )
    if probe_steps is not None and (no_probe or probe_steps < 1):
        raise InputError(
            "the probe is asked for and forbidden" if no_probe else "the probe needs a step",
            got=f"--probe-steps {probe_steps}" + (" with --no-probe" if no_probe else ""),
            expected="1 or more",
            mend=f"--probe-steps {STEPS} is the default; --no-probe leaves it out",
        )
    return Words(0 if no_probe else probe_steps or STEPS, tuple(dict.fromkeys(keep)))


@cache
def prober_digest() -> str:
    """Digest of the code that decides: a change in it can change what it keeps."""
    folder = Path(__file__).parent / "quantize"
    text = "".join((folder / name).read_text() for name in ("probe.py", "islands.py"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Narrowing:
    """What was decided: the nodes that stay in fp32, and what the probe saw, where it ran."""

    kept: Sequence[Kept] = ()
    probe: Probe | None = None

    @property
    def ranges(self) -> Mapping[str, Range]:
        return self.probe.ranges if self.probe else {}

    def downgrades(self) -> list[str]:
        """What is not in the precision that was asked for, in a line; what the user kept is none."""
        own = [k for k in self.kept if k.figure is not None]
        return [f"{len(self.kept)} nodes stay in fp32; {own[0].node}: {own[0].why}"] if own else []

    def spec(self) -> dict[str, Any]:
        """For the manifest: `fp32` lists the nodes with their modules, reasons and figures."""
        return {
            **({"fp32": [k.record() for k in self.kept]} if self.kept else {}),
            **({"probe": self.probe.summary()} if self.probe else {}),
        }


def narrowed(
    model: ir.Model,
    path: Path,
    component: Component,
    precision: str,
    words: Words,
    plan: Plan,
    clock: Clock,
    *,
    write: Callable[[ir.Model], Any],
    source: Callable[[], Source],
) -> tuple[Narrowing, Any]:
    """Decides, puts the islands into the model and writes it to `path` with `write`. Gives what `write` gave, too.

    To be probed an fp16 graph is written as it is; where nothing has to stay in fp32, that was the last writing.
    """
    from optimize.quantize.islands import check_nodes, islands_of, widen

    if words.keep and precision in NARROWS:
        check_nodes(words.keep, model)
    probes = precision == "fp16" and words.steps > 0
    narrowing = Narrowing()
    if probes:
        with clock("write"):
            written = write(model.clone())
        with clock("probe"):
            narrowing = probed(model, path, component, source(), words, plan, clock.say)
        path.with_suffix(".probe.json").write_text(json.dumps(narrowing.probe.table() if narrowing.probe else {}))
    elif words.keep and precision in NARROWS:
        narrowing = Narrowing(islands_of(model, precision, {}, words.keep, {}))
    if narrowing.kept:
        widen(model, precision, narrowing.kept, narrowing.ranges)
    if narrowing.kept or not probes:
        with clock("write again" if probes else "write"):
            written = write(model)
    return narrowing, written


def probed(
    model: ir.Model,
    path: Path,
    component: Component,
    source: Source,
    words: Words,
    plan: Plan,
    say: Callable[[str], None],
) -> Narrowing:
    """Runs the fp16 graph at `path`, whose weights `model` still knows as recipes, and decides."""
    from optimize.quantize.islands import islands_of
    from optimize.quantize.probe import parity_feeds, probe_graph, weight_ranges

    feeds, how = real_feeds(component, source, words.steps, plan, say)
    weights = weight_ranges(model, path)
    budget = plan.segment_bytes if plan.streamed else 1 << 62
    probe = probe_graph(path, [*parity_feeds(component), *feeds], budget, say, how=how, weights=weights)
    return Narrowing(islands_of(model, "fp16", probe.ranges, words.keep, weights), probe)


def real_feeds(
    component: Component, source: Source, steps: int, plan: Plan, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], str]:
    """Real feeds of the component, and how they came about. Drawn ones, with the reason, where none can be had."""
    from optimize.quantize.data import feeds_of
    from optimize.quantize.probe import drawn_feeds

    why = "the model does not fit into memory"
    if not plan.streamed:
        try:
            with tempfile.TemporaryDirectory() as folder:
                data = feeds_of(component, source, Path(folder), samples=steps, say=say)
                return list(data), data.how
        except InputError as e:
            why = e.what
    return drawn_feeds(component, steps), f"drawn: {why}"
