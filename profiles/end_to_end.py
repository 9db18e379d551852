"""A pipeline run from end to end with runners for its networks: the check of the sum in `composing`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from optimize.compile.bundle import record_of
from optimize.compile.records import ComponentRecord
from optimize.compile.runners import Bound, Feeds, Runner
from optimize.compile.spec import PRECISIONS, Component
from optimize.errors import InputError

from .composing import images_of_shape
from .drawing import Drawing, drawn, pipeline_of, why_not_drawn
from .schema import PipelineTime, Row
from .seen import Part
from .watching import watch


@dataclass(frozen=True)
class Measured:
    """End-to-end runs by wall clock, in milliseconds per image: each round's, and by component over all of them."""

    rounds_ms: tuple[float, ...]
    images: int
    parts: tuple[Part, ...]
    outside_ms: float

    @property
    def median_ms(self) -> float:
        return float(np.median(self.rounds_ms))

    def calls(self) -> dict[str, float]:
        """Component -> calls per image."""
        return {p.component: p.calls / len(self.rounds_ms) / self.images for p in self.parts}


class Typed:
    """A runner in a pipeline of fp32: its inputs become what a component of this precision takes.

    It runs as a measurement runs it, bound: eager's `infer` computes some fp16 in fp32 under a mode that costs a small
    network a quarter of its time. What a bound run gave is copied, because its next one may write over it.
    """

    def __init__(self, component: Component, runner: Runner, precision: str) -> None:
        self.name, self.runner, self.precision = runner.name, runner, precision
        self.specs = {t.name: t for t in component.inputs}

    def __enter__(self) -> Self:
        self.runner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.runner.__exit__(*error)

    def infer(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        if getattr(self.runner, "graphs", False):  # binding would capture a graph anew for each call
            return self.runner.infer(self.typed(feeds))
        return {name: tensor.clone() for name, tensor in self.bind(feeds)().items()}

    def bind(self, feeds: Feeds) -> Bound:
        return self.runner.bind(self.typed(feeds))

    def typed(self, feeds: Feeds) -> Feeds:
        if self.precision not in PRECISIONS:  # a quantized graph says itself what it takes
            return feeds
        return {n: t.to(getattr(torch, self.specs[n].torch_dtype(self.precision))) for n, t in feeds.items()}


def measure_pipeline(
    folder: Path,
    parts: Mapping[str, tuple[Component, Runner, str]],
    drawing: Drawing,
    *,
    rounds: int = 3,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> Measured:
    """The diffusers pipeline in `folder` draws one batch of images in each round, after one to warm up.

    `parts` gives by component name what is replaced: the component, the runner that stands in for it, its precision.
    Raises InputError where the folder's pipeline does not draw from a prompt alone, and for a drawing of two batches.
    """
    why = why_not_drawn(folder, {name: record_of(component) for name, (component, _, _) in parts.items()})
    if why is None and len(drawing.prompts) != drawing.batch:
        why = "a round is one batch of images"
    if why is not None:
        raise InputError("the pipeline cannot be run from end to end", got=why, expected="text to image, in one batch")
    runners: dict[str, tuple[Component, Runner]] = {
        name: (component, Typed(component, runner, precision)) for name, (component, runner, precision) in parts.items()
    }
    with pipeline_of(folder, runners, device) as pipe:
        say("end to end: warm-up")
        drawn(pipe, drawing, lambda _: None)
        with watch(pipe) as seen:
            for i in range(rounds):
                say(f"end to end: round {i + 1} of {rounds}")
                drawn(pipe, drawing, lambda _: None)
    per_image = rounds * drawing.batch
    return Measured(
        tuple(ms / drawing.batch for ms in seen.runs_ms), drawing.batch, tuple(seen.parts), seen.outside_ms / per_image
    )


def drawing_at(
    shape: str,
    rows: Sequence[Row],
    components: Mapping[str, ComponentRecord],
    prompts: Sequence[str],
    steps: int,
    guidance: float | None,
) -> Drawing:
    """One run at the sizes of this name, as the decoder has them: as many images as its batch. Seeds are 0, 1, ...

    Raises InputError where no decoder was profiled there: it is the decoder that knows pixels.
    """
    sizes = next((r.sizes for r in rows if r.shape == shape and role_of(r, components) == "vae_decoder"), None)
    if sizes is None or not {"height", "width"} <= sizes.keys():
        raise InputError(
            f"the pipeline cannot be run from end to end at {shape}",
            got="no decoder with a height and a width",
            expected="rows of the VAE's decoder at these sizes",
        )
    images = images_of_shape(rows, components, shape)
    chosen = tuple(prompts[i % len(prompts)] for i in range(images))
    return Drawing(chosen, tuple(range(images)), steps, guidance, sizes["height"], sizes["width"], images)


def role_of(row: Row, components: Mapping[str, ComponentRecord]) -> str:
    return components[row.component].role if row.component in components else ""


def with_measured(time: PipelineTime, measured: Measured) -> PipelineTime:
    """The sum with the run beside it, and where the two do not count the same."""
    notes = [*time.notes, f"end to end: {measured.outside_ms:.2f} ms per image in no network"]
    called = measured.calls()
    for part in time.parts:
        seen = called.get(part.component, 0.0)
        if abs(seen - part.calls) > 1e-6:  # thirds of a call, where a run draws three images
            notes.append(f"end to end: {part.component} was called {seen:g} times per image, not {part.calls:g}")
    return time.model_copy(
        update={"measured_ms": measured.median_ms, "rounds_ms": measured.rounds_ms, "notes": tuple(notes)}
    )
