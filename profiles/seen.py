"""What a watch has seen: marks in time, the calls between them, and the figures that they give."""

from __future__ import annotations

import io
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

OUTSIDE = "(outside)"

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Mark:
    """A moment: a monotonic clock and the processor time of all threads (ns), and an event in the device's stream."""

    wall: int
    cpu: int
    event: Any = None


class Clock:
    """Takes marks on a device, and tells what lies between two of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
        return Mark(time.perf_counter_ns(), time.process_time_ns(), event)

    def ms(self, begin: Mark, end: Mark) -> float:
        """Milliseconds between two marks, of the device where it has events; it is waited for here."""
        if begin.event is None or end.event is None:
            return (end.wall - begin.wall) / 1e6
        end.event.synchronize()
        return float(begin.event.elapsed_time(end.event))


@dataclass(eq=False)
class Span:
    """One call of a component, or with `part` None one run of the pipeline; `parent` is the call that it came from,
    `network` the module's name: a VAE has two components."""

    part: str | None
    network: str | None
    parent: Span | None
    shapes: Shapes
    begin: Mark
    end: Mark | None = None
    raised: bool = False


@dataclass(frozen=True)
class CallSize:
    """How often a component was called with these shapes; `batch` is the first dimension of the first one."""

    batch: int | None
    shapes: str
    calls: int


@dataclass(frozen=True)
class Part:
    """A component's calls, in milliseconds. `own_ms` is `total_ms` less the components called from within, and `share`
    its part of the wall time. `first_ms` stands apart: mean, median and p90 are those of all later calls, where there
    are any. `cpu_ms` is processor time of all threads; `host_ms` on a GPU the time until its calls returned."""

    component: str
    calls: int
    raised: int
    total_ms: float
    own_ms: float
    share: float
    first_ms: float
    mean_ms: float
    median_ms: float
    p90_ms: float
    cpu_ms: float
    host_ms: float
    sizes: tuple[CallSize, ...]


@dataclass
class Seen:
    """Calls on a clock, and what they come to.

    `wall_ms` is the time of the pipeline's runs and of calls of its components outside of them; where there was no run,
    and for a mapping of modules, that of the whole block. The own times of all parts and `outside_ms` add up to it.
    """

    title: str
    networks: tuple[str, ...]
    clock: Clock
    spans: list[Span] = field(default_factory=list, repr=False)
    block: tuple[Mark, Mark | None] | None = field(default=None, repr=False)

    def _times(self) -> dict[Span, float]:
        """Milliseconds of each call that has returned, in order."""
        return {s: self.clock.ms(s.begin, s.end) for s in self.spans if s.end is not None}

    @property
    def runs_ms(self) -> list[float]:
        """Wall time of each run of the pipeline, those that raised too."""
        return [ms for span, ms in self._times().items() if span.part is None and span.parent is None]

    @property
    def wall_ms(self) -> float:
        times = self._times()
        if any(span.part is None for span in times):
            return sum(ms for span, ms in times.items() if span.parent is None)
        begin, end = self.block or (self.clock.mark(), None)
        return self.clock.ms(begin, end or self.clock.mark())

    @property
    def outside_ms(self) -> float:
        """The part of `wall_ms` in no component: scheduler, tokenizers, copies, and what waits for them."""
        return self.wall_ms - sum(part.own_ms for part in self.parts)

    @property
    def parts(self) -> list[Part]:
        """The components that were called, in the order of their first calls."""
        times, wall = self._times(), self.wall_ms
        within: defaultdict[Span, float] = defaultdict(float)
        for span, ms in times.items():
            if span.part is not None and (caller := component_above(span)) is not None:
                within[caller] += ms
        grouped: dict[str, list[Span]] = {}
        for span in times:
            if span.part is not None:
                grouped.setdefault(span.part, []).append(span)
        return [part_of(name, spans, times, within, wall) for name, spans in grouped.items()]

    @property
    def never_called(self) -> list[str]:
        """Networks that nothing was seen of."""
        seen = {span.network for span in self.spans}
        return [n for n in self.networks if n not in seen]

    def rows(self) -> list[dict[str, Any]]:
        """Plain rows, one per component and a last one for what is outside of all: what pandas takes."""
        told = [{**vars(part), "sizes": sizes_text(part.sizes)} for part in self.parts]
        wall, outside = self.wall_ms, self.outside_ms
        rest = {"component": OUTSIDE, "total_ms": outside, "own_ms": outside, "share": outside / wall if wall else 0.0}
        return [*told, {**dict.fromkeys(Part.__dataclass_fields__), **rest}]

    def as_pandas(self) -> Any:
        """The same as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows())

    def __rich__(self) -> Any:
        from rich.table import Table

        runs = self.runs_ms
        times = f"{len(runs)} run{'s' * (len(runs) != 1)}, " if runs else ""
        table = Table(title=f"{self.title}: {times}{self.wall_ms:.1f} ms", title_justify="left")
        for name in ("component", "calls", "own ms", "share", "first ms", "median ms", "p90 ms", "CPU ms", "sizes"):
            table.add_column(name, justify="left" if name in ("component", "sizes") else "right")
        for row in self.rows():
            calls = row["calls"]
            figures = ("first_ms", "median_ms", "p90_ms", "cpu_ms")
            told = (f"{row[f]:.2f}" for f in figures) if calls else ("",) * len(figures)
            counted = "" if calls is None else str(calls)
            table.add_row(
                row["component"], counted, f"{row['own_ms']:.1f}", f"{row['share']:.1%}", *told, row["sizes"] or ""
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=160).print(self)
        never = f"never called: {', '.join(self.never_called)}\n" if self.never_called else ""
        return text.getvalue() + never


def component_above(span: Span) -> Span | None:
    """The component's call that this one came from, if any; a pipeline's run in between is none."""
    above = span.parent
    while above is not None and above.part is None:
        above = above.parent
    return above


def part_of(
    name: str, spans: Sequence[Span], times: Mapping[Span, float], within: Mapping[Span, float], wall: float
) -> Part:
    each = [times[s] for s in spans]
    total = sum(each)
    own = total - sum(within.get(s, 0.0) for s in spans)
    later = each[1:] or each
    ended = [(s.begin, s.end) for s in spans if s.end is not None]
    return Part(
        component=name,
        calls=len(spans),
        raised=sum(s.raised for s in spans),
        total_ms=total,
        own_ms=own,
        share=own / wall if wall else 0.0,
        first_ms=each[0],
        mean_ms=float(np.mean(later)),
        median_ms=float(np.median(later)),
        p90_ms=float(np.percentile(later, 90)),
        cpu_ms=sum(end.cpu - begin.cpu for begin, end in ended) / 1e6,
        host_ms=sum(end.wall - begin.wall for begin, end in ended) / 1e6,
        sizes=tuple(size_of(shapes, calls) for shapes, calls in Counter(s.shapes for s in spans).items()),
    )


def size_of(shapes: Shapes, calls: int) -> CallSize:
    batch = next((shape[0] for _, shape in shapes if shape), None)
    return CallSize(batch, ", ".join(f"{n} {'x'.join(map(str, s)) or 'scalar'}" for n, s in shapes), calls)


def sizes_text(sizes: Sequence[CallSize]) -> str:
    return "; ".join(f"{s.calls} of {s.shapes}" for s in sizes)
