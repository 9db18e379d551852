"""One component's rows: candidates are opened, compared with eager fp32, and only then timed, in interleaved rounds.

`STEPS` is what `optimize profile --dry-run` prints.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from optimize.candidates import FLOATS, REFERENCE, Candidate
from optimize.errors import GateError, OptimizeError
from optimize.seats import Job, seat_of

if TYPE_CHECKING:
    import torch

    from optimize.compile.spec import Component
    from optimize.profiles.schema import Memory, Preparation, Row, RowParity, RowQuality, Settings
    from optimize.profiles.timing import Burst, Measured

    Tensors = Mapping[str, torch.Tensor]

STEPS = (
    "draw feeds at each set of sizes, and real samples where the source has them",
    "run eager fp32 on them: the reference",
    "open every candidate in a process of its own",
    "bind the feeds: compile, first run",
    "compare outputs with the reference: what is not right is not timed",
    "interleaved rounds in random order, again until they agree",
    "count operations and bytes; where the time goes",
    "time per image, the answer, the report",
)
HEADROOM = 0.7
"""Share of the free memory that candidates may take together; more of them go one group after another."""
COPIES: Mapping[str, float] = {"cpu": 2.5, "cuda": 1.5}
"""Device -> times its weights that a candidate may take: while they are read a host has them twice, a GPU has not."""
BYTES: Mapping[str, int] = {"fp16": 2, "bf16": 2}
"""Precision -> bytes of a weight. 4 of any other: runtimes may unpack few bits."""


class Place(Protocol):
    """Where a candidate sits: `seats.Seat` here, or a `workers.Worker` that calls one in a process of its own."""

    def call(self, name: str, **words: Any) -> Any: ...
    def burst(self, ms: float, warmup_ms: float, cold: bool) -> Burst: ...
    def close(self) -> None: ...


@dataclass
class Here:
    """A seat in this process, called as a worker is."""

    seat: Any

    def call(self, name: str, **words: Any) -> Any:
        from optimize.profiles.timing import SideFailedError

        try:
            return getattr(self.seat, name)(**words)
        except OptimizeError:
            raise
        except Exception as e:  # as a worker does: whatever a backend raises is this candidate's failure
            raise SideFailedError(f"{type(e).__name__}: {' '.join(str(e).split())[:600]}") from e

    def burst(self, ms: float, warmup_ms: float, cold: bool) -> Burst:
        from optimize.profiles.timing import Burst

        return Burst(**self.call("burst", ms=ms, warmup_ms=warmup_ms, cold=cold))

    def close(self) -> None:
        self.seat.close()


def placed(job: Job, isolated: bool) -> Place:
    """The job's place, not opened yet."""
    from optimize.profiles.workers import Worker

    return Worker("optimize.seats", asdict(job), job.threads) if isolated else Here(seat_of(job))


@dataclass
class Task:
    """One component's measurement. `shapes` are sizes by name; `samples` real feeds, said of in `data`; `work` is a
    folder for tensors; `place` gives a job its place."""

    component: Component
    candidates: Sequence[Candidate]
    shapes: Mapping[str, Mapping[str, int]]
    settings: Settings
    device: str
    work: Path
    place: Callable[[Job], Place]
    samples: Sequence[Tensors] = ()
    data: str = ""
    seed: int = 0
    say: Callable[[str], None] = lambda _: None
    note: Callable[[], None] = lambda: None
    pace: Callable[[], float] | None = None


@dataclass
class Opened:
    """A candidate in its place, and what is known of it by shape. `failed` is why it goes on no more."""

    candidate: Candidate
    place: Place
    load_s: float = 0.0
    failed: str = ""
    ready: dict[str, Preparation] = field(default_factory=dict)
    parity: dict[str, RowParity] = field(default_factory=dict)
    quality: RowQuality | None = None
    memory: Memory | None = None

    def burst(self, ms: float, warmup_ms: float, cold: bool) -> Burst:
        return self.place.burst(ms, warmup_ms, cold)


def rows_of(task: Task) -> list[Row]:
    """A row for each candidate at each shape."""
    rows: list[Row] = [
        row_without(task, c, shape, "skipped", c.why) for c in task.candidates if c.why for shape in task.shapes
    ]
    chosen = [c for c in task.candidates if not c.why]
    if not chosen:
        return rows
    task.work.mkdir(parents=True, exist_ok=True)
    write_feeds(task)
    reference = next((c for c in chosen if c.name == REFERENCE), None)
    write_references(task, chosen, reference)
    for group in groups_of(task, chosen, reference):
        rows += rows_of_group(task, group)
    return sorted(
        rows, key=lambda r: ([c.name for c in task.candidates].index(r.candidate), list(task.shapes).index(r.shape))
    )


# --- feeds and references ---------------------------------------------------------------------------------------------


def file_of(task: Task, *words: str) -> Path:
    return task.work / (".".join(w.replace("/", "_").replace(" ", "_") for w in words) + ".safetensors")


def save(path: Path, tensors: Tensors) -> None:
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in tensors.items()}, path)


def read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {n: t.clone() for n, t in load_file(path).items()}  # apart from the file, which is written again


def write_feeds(task: Task) -> None:
    """Feeds of every shape, and the samples (without real ones: more draws at the first shape), in each precision."""
    from optimize.compile.feeds import feeds_for
    from optimize.profiles.judging import coarse, in_precision

    inputs = task.component.inputs
    drawn = {shape: coarse(feeds_for(inputs, sizes, "fp32", task.seed)) for shape, sizes in task.shapes.items()}
    for i, feeds in enumerate(task.samples):
        drawn[f"sample{i}"] = dict(feeds)
    for name, feeds in drawn.items():
        for precision in {"fp32", *(c.job.base for c in task.candidates)}:
            save(file_of(task, "feeds", name, precision), in_precision(inputs, feeds, precision))


def names_of_feeds(task: Task) -> list[str]:
    return [*task.shapes, *(f"sample{i}" for i in range(len(task.samples)))]


def write_references(task: Task, chosen: Sequence[Candidate], reference: Candidate | None) -> None:
    """Eager fp32's outputs for all feeds; eager's own in every other float precision, for the shapes' feeds.

    Where there is no module to run, the first candidate in fp32 stands in, and its own row says so.
    """
    first = reference or next((c for c in chosen if c.job.base == "fp32"), chosen[0])
    stand_in = replace(first.job, backend="eager", precision="fp32", artifact=None, path=None)
    if first is not reference and not can_run_eager(stand_in):
        stand_in = first.job
    task.say("eager fp32: the reference")
    with opened_place(task, stand_in) as place:
        for name in names_of_feeds(task):
            out = str(file_of(task, "exact", name))
            place.call("outputs", feeds=str(file_of(task, "feeds", name, "fp32")), out=out, bound=False)
    for precision in sorted({c.job.base for c in chosen} & set(FLOATS) - {"fp32"}):
        task.say(f"eager {precision}: its own error")
        with contextlib.suppress(OptimizeError), opened_place(task, replace(stand_in, precision=precision)) as place:
            for name in task.shapes:
                feeds, out = str(file_of(task, "feeds", name, precision)), str(file_of(task, "own", name, precision))
                place.call("outputs", feeds=feeds, out=out, bound=False)


def can_run_eager(job: Job) -> bool:
    from optimize.seats import component_of_job

    try:
        component_of_job(job)
    except OptimizeError:
        return False
    return True


@contextlib.contextmanager
def opened_place(task: Task, job: Job) -> Iterator[Place]:
    place = task.place(job)
    try:
        place.call("open")
        yield place
    finally:
        place.close()


# --- a group of candidates --------------------------------------------------------------------------------------------


def groups_of(task: Task, chosen: Sequence[Candidate], reference: Candidate | None) -> list[list[Candidate]]:
    """Candidates that fit into memory together, the reference in every group: ratios are within one."""
    numbers = sum(p.numel() for p in task.component.build().parameters()) if task.component.weights.kind else 0
    always = [reference] if reference else []
    room = free_bytes(task.device) * HEADROOM - sum(needed_bytes(task, c, numbers) for c in always)
    groups: list[list[Candidate]] = [[]]
    left = room
    for candidate in (c for c in chosen if c is not reference):
        need = needed_bytes(task, candidate, numbers)
        if need > left and groups[-1]:
            groups.append([])
            left = room
        groups[-1].append(candidate)
        left -= need
    return [[*always, *group] for group in groups]


def needed_bytes(task: Task, candidate: Candidate, numbers: int) -> float:
    """Of its weights. What a run takes beside them is what the headroom is for."""
    return COPIES[task.device] * numbers * BYTES.get(candidate.job.base, 4)


def free_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    from optimize.gate import available_bytes

    return available_bytes()


def rows_of_group(task: Task, group: Sequence[Candidate]) -> list[Row]:
    seats = {c.name: Opened(c, task.place(c.job)) for c in group}
    rows: list[Row] = []
    try:
        for seat in seats.values():
            task.say(f"{seat.candidate.name}: load")
            attempt(seat, partial(open_seat, seat))
        for shape in sorted(task.shapes, key=lambda s: math.prod(task.shapes[s].values())):  # peaks only grow
            for seat in seats.values():
                task.say(f"{seat.candidate.name}: first run at {shape}")
                attempt(seat, partial(prepare, task, seat, shape))
            rows += rows_at(task, shape, seats)
    finally:
        for seat in seats.values():
            seat.place.close()
    return rows


def attempt(seat: Opened, step: Callable[[], None]) -> None:
    """One candidate's step. What it breaks on is its own reason; the others go on."""
    if not seat.failed:
        try:
            step()
        except OptimizeError as e:
            seat.failed = " ".join(str(e).split())
            seat.place.close()  # what it holds the next one needs


def open_seat(seat: Opened) -> None:
    seat.load_s = seat.place.call("open")["load_s"]


def prepare(task: Task, seat: Opened, shape: str) -> None:
    """First runs at this shape, then parity, and once the quality on samples."""
    from optimize.profiles.judging import parity_of_row
    from optimize.profiles.schema import Memory

    feeds, out = str(file_of(task, "feeds", shape, seat.candidate.job.base)), file_of(task, "got", seat.candidate.name)
    seat.ready[shape] = preparation(seat, seat.place.call("bind", feeds=feeds))
    seat.place.call("outputs", feeds=feeds, out=str(out))
    own = file_of(task, "own", shape, seat.candidate.job.base)
    exact = read(file_of(task, "exact", shape))
    seat.parity[shape] = parity_of_row(
        read(out), exact, read(own) if own.exists() else None, seat.candidate.job.base, task.device
    )
    seat.memory = Memory(**seat.place.call("memory"))
    if seat.quality is None and seat.parity[shape].passed:
        seat.quality = quality(task, seat, shape, out)
        if seat.quality is not None and math.isnan(seat.quality.cosine):
            raise GateError(f"{seat.quality.output} is not finite on real samples", got=seat.quality.data)


def preparation(seat: Opened, first: Mapping[str, Any]) -> Preparation:
    from optimize.compile.backends import BACKENDS
    from optimize.profiles.schema import Preparation

    backend, seconds = BACKENDS[seat.candidate.job.backend], seat.candidate.seconds
    compiled = (first["first_ms"] - first["second_ms"]) / 1e3 if backend.compiles else seconds.get("compile")
    return Preparation(
        load_s=seat.load_s,
        compile_s=max(0.0, compiled) if compiled is not None else None,
        build_s=seconds.get("build") if backend.takes == "engine" else None,
        first_ms=first["second_ms"] if backend.compiles else first["first_ms"],
        cached=first["cached"],
        artifact_bytes=seat.candidate.bytes,
    )


def quality(task: Task, seat: Opened, shape: str, out: Path) -> RowQuality | None:
    """Beside the reference on the samples; without samples on the shape's own feeds."""
    from optimize.profiles.judging import quality_of_row

    names = [f"sample{i}" for i in range(len(task.samples))]
    pairs = []
    for name in names:
        feeds = str(file_of(task, "feeds", name, seat.candidate.job.base))
        seat.place.call("outputs", feeds=feeds, out=str(out))
        pairs.append((read(out), read(file_of(task, "exact", name))))
    if not names:
        pairs = [(read(out), read(file_of(task, "exact", shape)))]
    return quality_of_row(pairs, task.data if names else f"random feeds at {shape}")


def rows_at(task: Task, shape: str, seats: Mapping[str, Opened]) -> list[Row]:
    """Rows of one shape: those that are right are timed, and the others say why they are not."""
    from optimize.profiles.timing import measure

    right = {n: s for n, s in seats.items() if not s.failed and s.parity[shape].passed}
    measured = measure(
        right,
        {n: s.parity[shape] for n, s in right.items()},
        task.settings,
        device=task.device,
        reference=REFERENCE,
        say=lambda text: task.say(f"{shape}: {text}"),
        after_round=task.note,
        pace=task.pace,
    )
    for name, why in measured.failed.items():
        seats[name].failed = " ".join(why.split())
    return [row_of(task, shape, seat, measured) for seat in seats.values()]


def row_of(task: Task, shape: str, seat: Opened, measured: Measured) -> Row:
    from optimize.profiles.schema import Row

    name, parity = seat.candidate.name, seat.parity.get(shape)
    if seat.failed or parity is None or not parity.passed:
        why = seat.failed or wrong(parity)
        row = row_without(task, seat.candidate, shape, "failed", why)
        return row.model_copy(update={"parity": parity, "preparation": seat.ready.get(shape)})
    timing = measured.timings[name]
    batch = task.shapes[shape].get("batch", 1)
    return Row(
        **identity(task, seat.candidate, shape),
        state="measured" if timing.stable else "inconclusive",
        why="" if timing.stable else unstable(timing, task.settings),
        parity=parity,
        quality=seat.quality,
        timing=timing,
        ratio=measured.ratios.get(name),
        preparation=seat.ready[shape],
        memory=seat.memory,
        energy_j=measured.energy_j.get(name),
        throughput_per_s=1e3 * batch / timing.median_ms,
    )


def wrong(parity: RowParity | None) -> str:
    if parity is None:
        return "it was not compared"
    return f"wrong numbers: {parity.output} is off by {parity.relative:.3g}; rule: {parity.rule}"


def unstable(timing: Any, settings: Settings) -> str:
    return (
        f"the rounds do not agree after {timing.attempts} attempts: spread {timing.spread:.1%} (at most "
        f"{settings.spread:.0%}), last to first {timing.drift:+.1%} (at most {settings.drift:.0%})"
        + (f"; beside {timing.disturbed} of them the machine was slower than elsewhere" if timing.disturbed else "")
    )


def identity(task: Task, candidate: Candidate, shape: str) -> dict[str, Any]:
    return {
        "component": task.component.name,
        "role": task.component.role,
        "shape": shape,
        "sizes": dict(task.shapes[shape]),
        "backend": candidate.job.backend,
        "precision": candidate.job.precision,
        "artifact": candidate.job.artifact,
        "sha256": candidate.sha256,
    }


def row_without(task: Task, candidate: Candidate, shape: str, state: Any, why: str) -> Row:
    from optimize.profiles.schema import Row

    return Row(**identity(task, candidate, shape), state=state, why=why)
