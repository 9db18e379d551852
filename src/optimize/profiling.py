"""`optimize.profile`: which backend and precision to deploy for each component, how fast it is, and what it costs.

Here are the words, the plan, and what is kept of a killed run. How one component is measured stands in `measuring.py`,
what is made of all the rows in `answering.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.candidates import (
    AXES_WORDS,
    Candidate,
    Subject,
    candidates_of,
    shapes_from_words,
    subject_from,
    subject_of_bundle,
)
from optimize.errors import InputError, OptimizeError
from optimize.measuring import Task, placed, rows_of
from optimize.progress import Progress

if TYPE_CHECKING:
    import torch

    from optimize.compile.spec import Component
    from optimize.profiles.machine import Meter
    from optimize.profiles.schema import Load, Machine, Profile, Row, Settings
    from optimize.profiles.work import GraphWork

FOLDER = "profile"
PARTIAL, WORK = ".partial.json", ".work-"
ROUNDS, BURST_MS, WARMUP_MS, ATTEMPTS, PATIENCE = 9, 200.0, 50.0, 3, 3.0
DRIFT, SPREAD = 0.03, 0.10
TURN_MS, PACE = 25.0, 0.04
SAMPLES = 8
OPERATORS = ("none", "picks", "all")


@dataclass(frozen=True)
class Request:
    """What was asked for, in typed values."""

    settings: Settings
    device: str
    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    threads: int = 0
    operators: str = "picks"
    steps: int | None = None
    guidance: float | None = None
    targets: tuple[str, ...] = ()
    wishes: Any = None
    isolated: bool = True


@dataclass
class Session:
    """One profile in the making: `folder` is where it is kept (None: nowhere), `work` a place for tensors."""

    subject: Subject
    request: Request
    machine: Machine
    work: Path
    folder: Path | None
    progress: Progress
    meter: Meter
    notes: list[str] = field(default_factory=list)
    counted: dict[tuple[str, str, str], GraphWork | None] = field(default_factory=dict)
    packages: dict[Path, tuple[float, str]] = field(default_factory=dict)
    """AOTInductor packages made for this profile: seconds, or why not."""
    loads: list[Load] = field(default_factory=list)
    """Of the runs whose rows were kept."""


def profile(
    what: Any,
    *,
    backends: Sequence[str] = (),
    precisions: Sequence[str] = (),
    components: Sequence[str] = (),
    shapes: Sequence[str] = (),
    axes: Sequence[str] = (),
    inputs: Any = None,
    device: str = "auto",
    threads: int = 0,
    samples: int = SAMPLES,
    rounds: int = ROUNDS,
    burst_ms: float = BURST_MS,
    attempts: int = ATTEMPTS,
    patience: float = PATIENCE,
    cold_cache: bool = False,
    seed: int = 0,
    operators: str = "picks",
    steps: int | None = None,
    guidance: float | None = None,
    targets: Sequence[str] = (),
    slo: Sequence[str] = (),
    quality: Sequence[str] = (),
    memory: int | None = None,
    price_per_hour: float | None = None,
    load: str | None = None,
    against: Path | str | None = None,
    report: Path | str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    isolated: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Measures candidates (backend x precision) of each component on this machine, and answers which to deploy.

    Args:
        what: a bundle's folder, or what `optimize.load` gave; a source that `optimize export` takes, run without being
            exported; or your own function or torch module, or several by name, with `inputs`.
        backends, precisions, components: only these; without, every backend that is there by default.
        shapes: `NAME=AXIS:SIZE,AXIS:SIZE`, or `min`, `opt` (the default), `max` of the axes.
        inputs: tensors that a function is called with, a sequence or by name.
        device: `cpu`, `cuda`, or `auto`. `threads` of a CPU, 0 for all cores.
        samples: real feeds on which the quality is measured; 0 for random ones.
        rounds, burst_ms, attempts, patience, cold_cache: see `profiles.schema.Settings`.
        operators: where the time goes: of `none`, the `picks` (and eager), or `all` candidates.
        steps, guidance: of a pipeline's run (default: its own); makes latencies into time per image.
        targets: GPUs that are not here, for which the roofline gives estimates.
        slo, quality, memory, price_per_hour, load: wishes, see `profiles.wishes`.
        against: an older record to compare with.
        report: folder for `report.html` and `profile.json`; without it, a bundle keeps its record in `DIR/profile`.
        isolated: each candidate in a process of its own, so that it cannot disturb or break the others.
        dry_run: gives what would be measured, a row for each candidate at each shape, and measures nothing.

    Returns:
        The record (`profiles.schema.Profile`). Rows that could not be measured are in it, with the reason.

    Raises:
        InputError: the words are wrong, or sizes are outside of the axes. MissingError: no such device.
    """
    from optimize.answering import answered
    from optimize.compile.backends import device_from_word
    from optimize.compile.spec import PRECISIONS, QUANTIZED
    from optimize.exporting import choose
    from optimize.profiles.machine import Meter, machine_here
    from optimize.profiles.schema import Settings
    from optimize.profiles.targets import TARGETS, sheet_from_name
    from optimize.profiles.wishes import wishes_from_words

    choose("precision", precisions, (*PRECISIONS, *QUANTIZED))
    check_numbers(threads, seed, steps, guidance)
    if operators not in OPERATORS:
        raise InputError(f"unknown word {operators} for operators", expected=", ".join(OPERATORS))
    device = device_from_word(device)
    for name in targets:
        if sheet_from_name(name) is None:
            raise InputError(f"no sheet for the target {name}", expected=", ".join(TARGETS))
    settings = settings_of(Settings, device, rounds, burst_ms, attempts, patience, cold_cache, seed, samples)
    wishes = wishes_from_words(slo=slo, quality=quality, memory=memory, price_per_hour=price_per_hour, load=load)
    request = Request(
        settings,
        device,
        tuple(backends),
        tuple(precisions),
        tuple(shapes),
        threads,
        operators,
        steps,
        guidance,
        tuple(targets),
        wishes,
        isolated,
    )
    shown = progress or Progress(enabled=False)
    if callable(what) or (isinstance(what, Mapping) and not hasattr(what, "bundle")):
        from optimize.callables import check_words, profile_callables

        wished = {"slo": slo, "quality": quality, "memory": memory, "price_per_hour": price_per_hour}
        check_words(components=components, axes=axes, against=against, steps=steps, guidance=guidance, **wished)
        return profile_callables(what, inputs, request, shown, None if report is None else Path(report))
    trust = (*(["pickle"] if allow_pickle else []), *(["remote code"] if trust_remote_code else []))
    if hasattr(what, "bundle"):
        subject = subject_of_bundle(what, components, trust)
    else:
        subject = subject_from(what, components, axes, trust)
    older = older_record(against)
    folder = Path(report) if report is not None else subject.folder / FOLDER if subject.folder else None
    if dry_run:
        return rows_planned(
            Session(subject, request, machine_here(device, threads), Path(), None, shown, Meter(device))
        )
    with workspace(folder) as work:
        session = Session(subject, request, machine_here(device, threads), work, folder, shown, Meter(device))
        found = measured(session)
        return answered(session, found, older)


def check_numbers(threads: int, seed: int, steps: int | None, guidance: float | None) -> None:
    """Raises InputError for numbers that nothing can be measured with."""
    cores = len(os.sched_getaffinity(0))
    if not 0 <= threads <= cores:
        raise InputError("--threads does not fit this machine", got=threads, expected=f"1 to {cores}, or 0 for all")
    if seed < 0:
        raise InputError("--seed is below zero", got=seed, expected="0 or more")
    if steps is not None and steps < 1:
        raise InputError("--steps is too small", got=steps, expected="1 or more")
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise InputError("--guidance is no scale", got=guidance, expected="0 or more")


def settings_of(
    kind: type[Settings],
    device: str,
    rounds: int,
    burst_ms: float,
    attempts: int,
    patience: float,
    cold: bool,
    seed: int,
    samples: int,
) -> Settings:
    if not 0 < burst_ms < math.inf:
        raise InputError(
            "--burst is no time", got=burst_ms, expected="milliseconds above 0", mend="such as --burst 200"
        )
    for word, number, least in (("rounds", rounds, 3), ("attempts", attempts, 1), ("patience", patience, 0.0)):
        if not number >= least:
            raise InputError(f"--{word} is too small", got=number, expected=f"at least {least}")
    if samples < 0:
        raise InputError("--samples is below zero", got=samples, expected="0 (random feeds) or more")
    return kind(
        rounds=rounds,
        burst_ms=burst_ms,
        warmup_ms=WARMUP_MS,
        attempts=attempts,
        drift=DRIFT,
        spread=SPREAD,
        **({"turn_ms": TURN_MS, "pace": PACE, "patience": patience} if device == "cpu" else {}),
        seed=seed,
        cold_cache=cold,
        samples=samples,
    )


def older_record(path: Path | str | None) -> Profile | None:
    from optimize.profiles.reading import profile_from_file

    return None if path is None else profile_from_file(Path(path))


@contextlib.contextmanager
def workspace(folder: Path | None) -> Iterator[Path]:
    """A folder for tensors, gone afterwards; beside the record where there is one."""
    from optimize.compile.bundle import scratch

    if folder is None:
        with tempfile.TemporaryDirectory(prefix="optimize-profile-") as made:
            yield Path(made)
        return
    with scratch(folder, WORK) as made:
        yield made


# --- rows ------------------------------------------------------------------------------------------------------------


def plan(session: Session) -> dict[str, tuple[list[Candidate], dict[str, dict[str, int]]]]:
    """Component -> its candidates, and its named sizes."""
    request, subject = session.request, session.subject
    shapes = shapes_from_words(request.shapes, subject.components)
    add_guided(session, shapes)
    return {
        name: (
            candidates_of(subject, name, request.backends, request.precisions, request.device, request.threads),
            shapes[name],
        )
        for name in subject.components
    }


def rows_planned(session: Session) -> list[dict[str, Any]]:
    """What `--dry-run` prints."""
    return [
        {
            "component": name,
            "shape": shape,
            "sizes": ", ".join(f"{n}={size}" for n, size in sizes.items()),
            "backend": c.job.backend,
            "precision": c.job.precision,
            "artifact": c.job.artifact or "",
            "do": "skip" if c.why else "measure",
            "why": c.why,
        }
        for name, (candidates, shapes) in plan(session).items()
        for shape, sizes in shapes.items()
        for c in candidates
    ]


def add_guided(session: Session, shapes: dict[str, dict[str, dict[str, int]]]) -> None:
    """A denoiser's sizes at twice the batch, where its pipeline guides."""
    from optimize.profiles.choosing import GUIDED
    from optimize.profiles.composing import batch_factor, is_guided

    folder = pipeline_folder(session.subject)
    if folder is None or not is_guided(folder, guidance_of(session)):
        return
    records = records_of(session.subject)
    for name, component in session.subject.components.items():
        if batch_factor(records, name, True) > 1 and "batch" in component.axes:
            for shape, sizes in list(shapes[name].items()):
                twice = {**sizes, "batch": 2 * sizes["batch"]}
                if twice["batch"] <= component.axes["batch"].max and shape not in AXES_WORDS[::2]:
                    shapes[name][shape + GUIDED] = twice


def records_of(subject: Subject) -> dict[str, Any]:
    from optimize.compile.bundle import record_of

    return {name: record_of(component) for name, component in subject.components.items()}


def pipeline_folder(subject: Subject) -> Path | None:
    """Where the components' own pipeline lies, if it is one that draws from a prompt."""
    from optimize.loading import source_of
    from optimize.profiles.drawing import why_not_drawn

    if subject.loaded is None:
        return None
    try:
        source = source_of(subject.loaded.bundle, tuple(subject.components), subject.loaded.trust_remote_code)
    except OptimizeError:
        return None
    return source.folder if why_not_drawn(source.folder, records_of(subject)) is None else None


def guidance_of(session: Session) -> float | None:
    from optimize.evaluating import DEMO_GUIDANCE

    demo = session.subject.source == "demo"
    return session.request.guidance if session.request.guidance is not None else DEMO_GUIDANCE if demo else None


def measured(session: Session) -> list[Row]:
    """All rows, component by component; what an earlier run of the same measured before it was killed is kept."""
    rows: list[Row] = []
    for name, (candidates, shapes) in plan(session).items():
        key = key_of(session, name, candidates, shapes)
        kept = kept_rows(session.folder, key)
        if kept is None:
            with session.progress.step(f"profile {name}"):
                found = rows_of(task_of(session, name, candidates, shapes))
            keep_rows(session.folder, key, found, session.meter.load())
        else:
            found, load = kept
            session.loads.append(load)
            session.notes.append(f"{name}: measured before this run was interrupted, and kept")
        rows += found
    return rows


def task_of(
    session: Session, name: str, candidates: Sequence[Candidate], shapes: Mapping[str, Mapping[str, int]]
) -> Task:
    from optimize.profiles.timing import pace_of

    request, component = session.request, session.subject.components[name]
    samples, data = real_samples(session, component, next(iter(shapes.values())))
    return Task(
        component,
        [packaged(session, c) for c in candidates],
        shapes,
        request.settings,
        request.device,
        session.work / name,
        partial(placed, isolated=request.isolated),
        samples,
        data,
        request.settings.seed,
        session.progress.say,
        session.meter.note,
        pace_of(request.device, request.threads),
    )


def packaged(session: Session, candidate: Candidate) -> Candidate:
    """A candidate that needs an AOTInductor package which no bundle has gets one, made once for this profile."""
    from optimize.compile.aoti import package_from_component

    job = candidate.job
    if job.backend != "aoti" or job.artifact is not None or candidate.why:
        return candidate
    path = session.work / f"{job.component}.{job.precision}.pt2"
    if path not in session.packages:
        session.progress.say(f"{candidate.name}: compile a package")
        start, why = time.perf_counter(), ""
        try:
            package_from_component(session.subject.components[job.component], job.precision, path, job.device)
        except OptimizeError as e:
            why = " ".join(str(e).split())
        session.packages[path] = (time.perf_counter() - start, why)
    seconds, why = session.packages[path]
    if why:
        return replace(candidate, why=why)
    return Candidate(replace(job, path=str(path)), bytes=path.stat().st_size, seconds={"compile": seconds})


def real_samples(
    session: Session, component: Component, sizes: Mapping[str, int]
) -> tuple[list[dict[str, torch.Tensor]], str]:
    """Feeds from the source's own data that have these sizes, and how they came about."""
    from optimize.loading import source_of
    from optimize.quantize.data import feeds_of
    from optimize.quantize.fit import sizes_of
    from optimize.quantize.texts import MEASURED

    subject, wanted = session.subject, session.request.settings.samples
    if subject.loaded is None or not wanted:
        return [], ""
    folder = subject.loaded.bundle.root / "quality" / "feeds" / component.name
    try:
        source = source_of(subject.loaded.bundle, (component.name,), subject.loaded.trust_remote_code)
        session.progress.say("samples")
        made = feeds_of(component, source, folder, samples=2 * wanted, seed=MEASURED + 1, say=session.progress.say)
    except OptimizeError:  # without its source or its data, random feeds have to do
        return [], ""
    shapes = ((feeds, {n: tuple(t.shape) for n, t in feeds.items()}) for feeds in made)
    fitting = [feeds for feeds, s in shapes if agree(sizes_of(component.inputs, s), sizes)][:wanted]
    return fitting, f"{len(fitting)} samples: {made.how}" if fitting else ""


def agree(found: Mapping[str, int], wanted: Mapping[str, int]) -> bool:
    return all(wanted.get(axis) == size for axis, size in found.items())


def key_of(
    session: Session, name: str, candidates: Sequence[Candidate], shapes: Mapping[str, Mapping[str, int]]
) -> str:
    """Digest of all that a component's rows depend on."""
    said = {
        "candidates": [(c.name, c.sha256, c.why) for c in candidates],
        "weights": session.subject.components[name].weights.digest(),
        "config": json.dumps(session.subject.components[name].config, sort_keys=True, default=str),
        "shapes": shapes,
        "settings": session.request.settings.model_dump(),
        "machine": session.machine.key,
        "versions": session.machine.versions,
    }
    return f"{name} {hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]}"


def kept_rows(folder: Path | None, key: str) -> tuple[list[Row], Load] | None:
    """A component's rows, and what the machine did meanwhile."""
    from optimize.profiles.schema import Load, Row

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a broken file is none
        found = json.loads((folder / PARTIAL).read_text())[key] if folder else None
        if found is not None:
            return [Row.model_validate(row) for row in found["rows"]], Load.model_validate(found["load"])
    return None


def keep_rows(folder: Path | None, key: str, rows: Sequence[Row], load: Load) -> None:
    if folder is None:
        return
    path, known = folder / PARTIAL, {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text())
    known[key] = {"rows": [row.model_dump(mode="json") for row in rows], "load": load.model_dump(mode="json")}
    temporary = path.with_name(f"{PARTIAL}.{os.getpid()}")
    temporary.write_text(json.dumps(known))
    temporary.replace(path)
