"""Time per image: component latencies times their calls.

How often a pipeline of diffusers calls its networks, and with how many rows, is counted here by role; `optimize.watch`
sees it on a running one, and the tests hold the two to each other. A latency is taken at the very sizes that the call
has. Where guidance doubles the denoiser's batch and no such row was measured, the pair is counted as two calls of the
single batch, and a note says so: nothing is scaled.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.compile.records import ComponentRecord
from optimize.errors import InputError

from .schema import Pick, PipelinePart, PipelineTime, Row, Timing

DENOISERS = ("unet", "dit")
UNDOUBLED = ("FluxTransformer2DModel", "UNet2DModel")
"""Denoisers that see no second, unguided half: FLUX takes the guidance as a number, the other knows no prompt."""
ZEROED = "time_ids"
"""An input that SDXL's denoiser has: its pipeline takes zeros for an empty negative prompt and encodes none."""
PICKED = "picked"

Candidate = tuple[str, str]
"""Backend and precision."""


# --- how often -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """`count` calls of a component for one run of its pipeline, each with `batch` rows."""

    count: int
    batch: int


def calls_of(
    components: Mapping[str, ComponentRecord], steps: int, guidance: bool, images: int = 1
) -> dict[str, Calls]:
    """Component -> its calls while `images` images are drawn from as many prompts; none of a VAE's encoder, which a
    pipeline from text does not need.

    `steps` are the denoiser's (see `denoiser_steps`), `guidance` is what the pipelines call classifier-free guidance.
    """
    doubled = guidance and doubles(components)
    zeroed = any(ZEROED in (t.name for t in c.inputs) for c in components.values() if c.role in DENOISERS)
    denoised = Calls(steps, images * (1 + doubled))
    by_role = {
        "text_encoder": Calls(1 + (doubled and not zeroed), images),
        **dict.fromkeys((*DENOISERS, "controlnet"), denoised),
        "vae_decoder": Calls(1, images),
    }
    return {name: by_role.get(c.role, Calls(0, images)) for name, c in components.items()}


def doubles(components: Mapping[str, ComponentRecord]) -> bool:
    """Whether guidance doubles the denoiser's batch: a half with the prompt, a half without."""
    return any(c.role in DENOISERS and c.class_name not in UNDOUBLED for c in components.values())


def batch_factor(components: Mapping[str, ComponentRecord], name: str, guidance: bool) -> int:
    """Rows of a call of this component per image: what its measured batch has to be for each image of a run."""
    return max(calls_of(components, 1, guidance)[name].batch, 1)


def is_guided(folder: Path, guidance: float | None) -> bool:
    """Whether a pipeline guides at this scale; None is its own default."""
    from .drawing import pipeline_class

    if guidance is None:
        default = inspect.signature(pipeline_class(folder).__call__).parameters.get("guidance_scale")
        guidance = 0.0 if default is None or default.default is default.empty else float(default.default)
    return guidance > 1


def denoiser_steps(folder: Path, steps: int) -> int:
    """How often the scheduler in a pipeline's folder calls the denoiser for so many steps: Heun's nearly twice, PNDM
    once more. The same number where its schedule cannot be made without the pipeline."""
    import diffusers

    config = folder / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        return steps
    cls = getattr(diffusers, str(json.loads(config.read_text()).get("_class_name")), None)
    try:
        scheduler: Any = None if cls is None else cls.from_pretrained(str(config.parent))
        if scheduler is None:
            return steps
        scheduler.set_timesteps(steps)
    except (TypeError, ValueError):  # flow matching that is shifted by the image's size: a call a step
        return steps
    return len(scheduler.timesteps)


# --- the sum ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One run: `steps` as asked for, `calls` those of the denoiser (None: as many), at the sizes named `shape`."""

    shape: str
    steps: int
    guidance: bool
    calls: int | None = None


def pipeline_times(
    rows: Sequence[Row],
    components: Mapping[str, ComponentRecord],
    steps: int,
    guidance: bool,
    *,
    calls: int | None = None,
    picks: Sequence[Pick] = (),
) -> tuple[list[PipelineTime], list[str]]:
    """Time per image at each named set of sizes, for every candidate and for what was picked; and what could not be
    told, in words.

    A component that was not measured as the candidate runs as the same backend's fp32, else as eager fp32, and a note
    says so. `steps`, `guidance` and `calls` as in `Setting`.
    """
    if not any(c.role in DENOISERS for c in components.values()):
        return [], ["time per image: there is no denoiser among the components"]
    times: list[PipelineTime] = []
    missing: list[str] = []
    for shape in dict.fromkeys(row.shape for row in rows if not is_auxiliary(rows, components, row.shape)):
        setting = Setting(shape, steps, guidance, calls)
        for variant, wanted in variants_of(rows, components, shape, picks).items():
            try:
                times.append(composed(rows, components, setting, variant, wanted))
            except InputError as e:
                missing.append(f"time per image at {shape} as {variant}: {e.what}")
    return times, missing


def is_auxiliary(rows: Iterable[Row], components: Mapping[str, ComponentRecord], shape: str) -> bool:
    """Sizes of denoisers alone, measured for what guidance makes of other sizes."""
    here = {components[r.component].role for r in rows if is_at(r, components, shape)}
    others = {c.role for c in components.values()} - {*DENOISERS, "controlnet", "vae_encoder"}
    return bool(others) and not here.intersection(others)


def variants_of(
    rows: Iterable[Row], components: Mapping[str, ComponentRecord], shape: str, picks: Sequence[Pick]
) -> dict[str, dict[str, Candidate]]:
    """Variant -> what each component is to run as."""
    here = [row for row in rows if row.shape == shape and row.component in components and row.timing is not None]
    variants = {row.candidate: dict.fromkeys(components, (row.backend, row.precision)) for row in here}
    chosen = {p.component: (p.backend, p.precision) for p in picks if p.shape == shape}
    return {**variants, **({PICKED: chosen} if chosen else {})}


def composed(
    rows: Sequence[Row],
    components: Mapping[str, ComponentRecord],
    setting: Setting,
    variant: str,
    wanted: Mapping[str, Candidate],
) -> PipelineTime:
    """Raises InputError where a component has no row that could stand in the sum."""
    images = images_of_shape(rows, components, setting.shape)
    parts: list[PipelinePart] = []
    notes: list[str] = []
    for name, calls in calls_of(components, setting.calls or setting.steps, setting.guidance, images).items():
        if calls.count:
            row, count, said = row_for(rows, name, setting.shape, calls, images, wanted.get(name))
            assert row.timing is not None  # `measured_at` takes no other
            each = count / images
            parts.append(
                PipelinePart(component=name, candidate=row.candidate, calls=each, ms=each * row.timing.median_ms)
            )
            notes += said
    if setting.calls not in (None, setting.steps):
        notes.append(f"the scheduler calls the denoiser {setting.calls} times for {setting.steps} steps")
    return PipelineTime(
        variant=variant,
        shape=setting.shape,
        steps=setting.steps,
        guidance=setting.guidance,
        parts=parts,
        composed_ms=sum(part.ms for part in parts),
        notes=tuple(notes),
    )


def images_of_shape(rows: Iterable[Row], components: Mapping[str, ComponentRecord], shape: str) -> int:
    """Images that a run at these sizes draws: the decoder's batch, or without one the denoiser's."""
    batches = {components[r.component].role: r.sizes.get("batch", 1) for r in rows if is_at(r, components, shape)}
    return next((batches[role] for role in ("vae_decoder", *DENOISERS) if role in batches), 1)


def is_at(row: Row, components: Mapping[str, ComponentRecord], shape: str) -> bool:
    return row.shape == shape and row.component in components


def row_for(
    rows: Sequence[Row], name: str, shape: str, calls: Calls, images: int, wanted: Candidate | None
) -> tuple[Row, int, list[str]]:
    """The row of a component's calls, how many such calls there are, and what has to be said about it."""
    sizes = next((row.sizes for row in rows if row.component == name and row.shape == shape), None)
    if sizes is None:
        raise InputError(f"{name} was not profiled at these sizes")
    exact = {**sizes, "batch": calls.batch} if "batch" in sizes else sizes
    tried: list[tuple[dict[str, int], int]] = [(exact, calls.count)]
    if calls.batch == 2 * images:
        tried.append(({**sizes, "batch": images}, 2 * calls.count))
    backend = wanted[0] if wanted else "eager"
    for candidate in dict.fromkeys((wanted or ("eager", "fp32"), (backend, "fp32"), ("eager", "fp32"))):
        for at, count in tried:
            row = measured_at(rows, name, candidate, at)
            if row is not None:
                return row, count, remarks(rows, row, wanted, shape, calls, count)
    raise InputError(f"{name} was measured at batch {calls.batch} as none of what could run it")


def measured_at(rows: Iterable[Row], name: str, candidate: Candidate, sizes: Mapping[str, int]) -> Row | None:
    """Under whatever name these sizes go."""
    for row in rows:
        same = row.component == name and (row.backend, row.precision) == candidate and row.sizes == sizes
        if same and row.timing is not None:
            return row
    return None


def remarks(rows: Iterable[Row], row: Row, wanted: Candidate | None, shape: str, calls: Calls, count: int) -> list[str]:
    name, said = row.component, []
    if wanted is not None and (row.backend, row.precision) != wanted:
        asked = " ".join(wanted)
        whys = (r.why for r in rows if (r.component, r.shape, r.candidate) == (name, shape, asked) and r.why)
        said.append(f"{name} as {row.candidate}: as {asked} {next(whys, 'it was not profiled')}")
    if count != calls.count:
        said.append(
            f"{name}: not measured at batch {calls.batch}, which guidance makes; "
            f"counted as two calls of batch {calls.batch // 2} for each"
        )
    if row.state == "inconclusive":
        said.append(f"{name} as {row.candidate}: its latency is inconclusive")
    return said


# --- a pipeline's candidates ------------------------------------------------------------------------------------------

IMAGE = "an image"


def image_rows(rows: Sequence[Row], times: Sequence[PipelineTime]) -> list[Row]:
    """Each variant of a pipeline as a row of its own, for a front of latency and quality: times are the sum of its
    parts', the quality is that of its worst part."""
    found = []
    for time in times:
        parts = [(part, row) for part in time.parts if (row := row_of_part(rows, time, part)) is not None]
        if len(parts) == len(time.parts) and parts:
            found.append(image_row(time, parts))
    return found


def row_of_part(rows: Iterable[Row], time: PipelineTime, part: PipelinePart) -> Row | None:
    """The row at the sizes of the call; its latency times the calls is the part's."""
    same = [r for r in rows if r.component == part.component and r.candidate == part.candidate and r.timing]
    return min(same, key=lambda r: abs(part.calls * (r.timing.median_ms if r.timing else 0) - part.ms), default=None)


def image_row(time: PipelineTime, parts: Sequence[tuple[PipelinePart, Row]]) -> Row:
    from .judging import badness

    words = time.variant.split(" ", 1)
    first = parts[0][1]
    sure = all(row.state == "measured" for _, row in parts)
    judged = [row for _, row in parts if row.quality is not None]
    worst = min(judged, key=lambda r: badness(r.quality), default=first)
    return first.model_copy(
        update={
            "component": IMAGE,
            "role": "pipeline",
            "shape": time.shape,
            "sizes": {},
            "backend": words[0],
            "precision": words[1] if len(words) > 1 else "",
            "state": "measured" if sure else "inconclusive",
            "why": "" if sure else "a part's rounds do not agree",
            "parity": worst.parity,
            "quality": worst.quality,
            "timing": summed(parts, sure),
        }
    )


def summed(parts: Sequence[tuple[PipelinePart, Row]], sure: bool) -> Timing:
    """Percentiles and rounds of the parts, times their calls, added up."""
    timings = [(part.calls, row.timing) for part, row in parts if row.timing is not None]
    fields = ("median_ms", "p10_ms", "p90_ms", "p95_ms", "p99_ms")
    rounds = zip(*([calls * ms for ms in t.rounds_ms] for calls, t in timings), strict=False)
    return timings[0][1].model_copy(
        update={
            **{field: sum(calls * getattr(t, field) for calls, t in timings) for field in fields},
            "rounds_ms": [sum(each) for each in rounds],
            "stable": sure,
            "cpu_ms": None,
        }
    )
