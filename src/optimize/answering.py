"""What a profile makes of its rows: rooflines, estimates, time per image, where time goes, the answer, the record."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.candidates import FLOATS, REFERENCE, candidates_of
from optimize.errors import InputError, OptimizeError
from optimize.profiling import PARTIAL, Session, guidance_of, packaged, pipeline_folder, records_of

if TYPE_CHECKING:
    from optimize.profiles.schema import Breakdown, Estimate, Limits, Load, PipelineTime, Profile, Row
    from optimize.profiles.work import GraphWork
    from optimize.seats import Job

STEPS = 25
"""Of a pipeline's run, where none are named."""


def answered(session: Session, rows: Sequence[Row], older: Profile | None) -> Profile:
    """The record: rooflines, the answer, where the time goes, time per image, estimates, comparison."""
    from optimize.profiles.choosing import choose
    from optimize.profiles.comparing import compare
    from optimize.profiles.composing import PICKED
    from optimize.profiles.limits import limits_here
    from optimize.profiles.machine import together
    from optimize.profiles.schema import Profile
    from optimize.profiles.timing import on_cores

    request = session.request
    load = together([session.meter.load(), *session.loads])
    with session.progress.step("limits of this device"):
        limits = limits_here(request.device, request.threads)
    rows = [with_work(session, row, limits) for row in rows]
    estimates = list(estimates_of(session, rows))
    record = Profile(
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        source=session.subject.source,
        command=command_of(session),
        machine=session.machine,
        load=load,
        settings=request.settings,
        limits=limits,
        rows=tuple(rows),
        estimates=tuple(estimates),
        pipelines=tuple(times_of(session, rows, ())),
    )
    record = record.model_copy(update={"choice": choose(record, request.wishes)})
    keep(session, record, done=False)
    if record.choice is not None and record.pipelines:
        with on_cores(request.threads):
            times = times_of(session, rows, record.choice.picks, last=True)
        picked = next((t for t in times if t.variant == PICKED), record.choice.pipeline)
        choice = record.choice.model_copy(update={"pipeline": picked})
        record = record.model_copy(update={"pipelines": tuple(times), "choice": choice})
    with on_cores(request.threads):
        record = record.model_copy(update={"breakdowns": tuple(breakdowns_of(session, record))})
    record = record.model_copy(update={"notes": (*notes_of(load, rows), *session.notes)})
    keep(session, record)
    if older is not None:  # with another record it may raise: what was measured is kept by then
        record = record.model_copy(update={"comparison": compare(record, older)})
        keep(session, record)
    return record


def keep(session: Session, record: Profile, *, done: bool = True) -> None:
    """Writes the record where there is a place for it; when it is done, rows kept for a killed run are not needed."""
    from optimize.compile.bundle import disk_errors
    from optimize.profiles.reading import RECORD, write_profile

    if session.folder is not None:
        with disk_errors(session.folder):
            write_profile(record, session.folder / RECORD)
            if done:
                (session.folder / PARTIAL).unlink(missing_ok=True)


def notes_of(load: Load, rows: Sequence[Row]) -> list[str]:
    notes = []
    if load.busy:
        notes.append(
            f"the machine was busy: other processes took {load.others:.0%} of its cores"
            + (f", its host {load.stolen:.0%}" if load.stolen > 0.01 else "")
            + "; ratios hold better than milliseconds"
        )
    timings = [r.timing for r in rows if r.timing]
    disturbed, rounds = sum(t.disturbed for t in timings), sum(len(t.rounds_ms) for t in timings)
    if disturbed > rounds / 10:
        notes.append(
            f"the machine's own speed wavered: beside {disturbed} of {rounds} rounds a fixed piece of work stayed "
            "slower than elsewhere; its host has other guests, or its clock fell"
        )
    notes += [f"the GPU was held back by its {reason}" for reason in load.gpu_throttled]
    return notes


def work_at(session: Session, row: Row) -> GraphWork | None:
    """What the row's component computes: counted from its graph, or from torch where it has none."""
    from optimize.profiles.module_work import work_of_component
    from optimize.profiles.work import work_of

    graph = graph_for(session, row)
    key = (row.component, row.shape, graph.id if graph else row.base)
    if key not in session.counted:
        component = session.subject.components[row.component]
        try:
            if graph is not None and session.subject.loaded is not None:
                session.counted[key] = work_of(session.subject.loaded.bundle.path(graph), row.sizes)
            else:
                session.counted[key] = work_of_component(component, row.base, row.sizes)
        except OptimizeError as e:
            session.counted[key] = None
            session.notes.append(f"{row.component}: its work could not be counted: {e.what}")
    return session.counted[key]


def graph_for(session: Session, row: Row) -> Any:
    """The ONNX artifact that a row ran, or the one of its precision."""
    if session.subject.loaded is None:
        return None
    known = {a.id: a for a in session.subject.loaded.bundle.artifacts(row.component, "onnx")}
    if row.artifact in known:
        return known[str(row.artifact)]
    wanted = row.base
    return next((a for a in known.values() if a.spec["precision"] == wanted), None)


def with_work(session: Session, row: Row, limits: Limits) -> Row:
    """The row with what it computes, and how near it comes to what the device allows."""
    from optimize.profiles.roofline import roofline_of

    if row.timing is None or (counted := work_at(session, row)) is None:
        return row
    allowed = row.backend.startswith("onnxruntime-") and "tf32" in limits.peak_gflops  # its GPU providers use it
    kind = "tf32" if allowed and row.base == "fp32" else row.base
    roofline = roofline_of(counted.total, row.timing.median_ms, limits, kind)
    return row.model_copy(update={"work": counted.total, "roofline": roofline})


def estimates_of(session: Session, rows: Sequence[Row]) -> Iterator[Estimate]:
    """Of every graph at every shape, for the targets that were named."""
    from optimize.profiles.limits import limits_from_sheet
    from optimize.profiles.roofline import estimate
    from optimize.profiles.targets import sheet_from_name

    for name in session.request.targets:
        sheet = sheet_from_name(name)
        assert sheet is not None  # the words were checked before anything was measured
        limits, seen = limits_from_sheet(sheet), set[tuple[str, str, str]]()
        for row in rows:
            label = (row.component, row.shape, row.base)
            if label in seen or (counted := work_at(session, row)) is None:
                continue
            seen.add(label)
            try:
                yield estimate(counted, sheet, limits, label[2], component=row.component, shape=row.shape)
            except InputError as e:
                session.notes.append(f"no estimate for {row.component} {label[2]} on {sheet.name}: {e.what}")


def times_of(session: Session, rows: Sequence[Row], picks: Sequence[Any], last: bool = False) -> list[PipelineTime]:
    """Time per image of each variant; with `picks` that of the answer too, and it is run from end to end."""
    from optimize.profiles.composing import denoiser_steps, is_guided, pipeline_times

    folder = pipeline_folder(session.subject)
    if folder is None:
        return []
    steps = session.request.steps or STEPS
    guided = is_guided(folder, guidance_of(session))
    times, missing = pipeline_times(
        rows, records_of(session.subject), steps, guided, calls=denoiser_steps(folder, steps), picks=picks
    )
    if last:
        session.notes += missing
        times = [run_from_end_to_end(session, folder, time, rows) for time in times]
    return times


def run_from_end_to_end(session: Session, folder: Path, time: PipelineTime, rows: Sequence[Row]) -> PipelineTime:
    """The pipeline itself with these parts, beside the sum; where that cannot be, a note says why."""
    from optimize.profiles.composing import PICKED
    from optimize.profiles.end_to_end import drawing_at, measure_pipeline, with_measured
    from optimize.quantize.texts import DIGITS, PROMPTS
    from optimize.seats import runner_of_job

    if time.variant not in (PICKED, REFERENCE):
        return time
    subject, parts = session.subject, {}
    prompts = DIGITS if subject.source == "demo" else PROMPTS
    try:
        for part in time.parts:
            job = jobs_by(session, part.component)[part.candidate]
            parts[part.component] = (subject.components[part.component], runner_of_job(job), float_of(job.base))
        drawing = drawing_at(time.shape, rows, records_of(subject), prompts, time.steps, guidance_of(session))
        with session.progress.step(f"end to end: {time.variant}"):
            found = measure_pipeline(folder, parts, drawing, device=session.request.device, say=session.progress.say)
    except Exception as e:  # each backend raises its own kinds: what was measured stands without this
        return time.model_copy(update={"notes": (*time.notes, f"not run from end to end: {why_of(e)}")})
    return with_measured(time, found)


def float_of(base: str) -> str:
    """The floating-point precision of a candidate's inputs."""
    return base if base in FLOATS else "fp32"


def jobs_by(session: Session, name: str) -> dict[str, Job]:
    """Candidate's name -> its job, for a component."""
    request = session.request
    found = candidates_of(session.subject, name, request.backends, request.precisions, request.device, request.threads)
    return {c.name: packaged(session, c).job for c in found if not c.why}


def breakdowns_of(session: Session, record: Profile) -> Iterator[Breakdown]:
    """Where the time goes, of the candidates asked for at the first sizes."""
    from optimize.compile.feeds import feeds_for
    from optimize.profiles.operators import breakdown_of
    from optimize.seats import runner_of_job

    for row in rows_to_break_down(record, session.request.operators):
        component = session.subject.components[row.component]
        job = jobs_by(session, row.component).get(row.candidate)
        if job is None:
            continue
        try:
            with session.progress.step(f"where the time goes: {row.component} {row.candidate}"):
                yield breakdown_of(
                    runner_of_job(job),
                    feeds_for(component.inputs, row.sizes, float_of(row.base)),
                    component=row.component,
                    shape=row.shape,
                    backend=row.backend,
                    precision=row.precision,
                    folder=session.folder,
                    work=work_at(session, row),
                )
        except Exception as e:  # each profiler raises its own kinds
            session.notes.append(f"{row.component} {row.candidate}: no breakdown: {why_of(e)}")


def why_of(e: Exception) -> str:
    return e.what if isinstance(e, OptimizeError) else f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def rows_to_break_down(record: Profile, which: str) -> Iterator[Row]:
    """`picks`: each component's pick and eager fp32, at the first sizes; `all`: every candidate there."""
    first: dict[str, str] = {}
    for row in record.rows:
        first.setdefault(row.component, row.shape)
    picked = {(p.component, p.backend, p.precision) for p in (record.choice.picks if record.choice else ())}
    for row in record.rows:
        here = row.timing is not None and row.shape == first[row.component]
        chosen = (row.component, row.backend, row.precision) in picked or row.candidate == REFERENCE
        if here and (which == "all" or (which == "picks" and chosen)):
            yield row


def command_of(session: Session) -> str:
    """How to run this again from a shell."""
    request, subject = session.request, session.subject
    words = ["optimize", "profile", str(subject.folder.name if subject.folder else subject.source)]
    for name in subject.components if subject.loaded and len(subject.components) < len(subject.loaded) else ():
        words += ["--component", name]
    lists = {"backend": request.backends, "precision": request.precisions, "shape": request.shapes}
    for word, values in lists.items():
        for value in values:
            words += [f"--{word}", value]
    settings, wishes = request.settings, request.wishes
    words += ["--device", request.device, "--rounds", str(settings.rounds), "--burst", f"{settings.burst_ms:g}"]
    words += ["--attempts", str(settings.attempts), "--patience", f"{settings.patience:g}"]
    words += ["--samples", str(settings.samples), "--seed", str(settings.seed)]
    for word, number in (("threads", request.threads), ("steps", request.steps), ("guidance", request.guidance)):
        words += [f"--{word}", f"{number:g}"] if number is not None else []
    words += ["--cold-cache"] if settings.cold_cache else []
    for word, each in (("slo", wishes.slo), ("quality", wishes.quality)):
        for wish in each:
            words += [f"--{word}", str(wish)]
    words += ["--memory", str(wishes.memory)] if wishes.memory else []
    words += ["--price-per-hour", f"{wishes.price_per_hour:g}"] if wishes.price_per_hour else []
    words += ["--load", f"{wishes.load_per_second:g}/s"] if wishes.load_per_second else []
    return shlex.join(words)
