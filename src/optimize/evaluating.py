"""`optimize.evaluate`: how good a bundle's artifacts are beside its fp32, network by network and image by image."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError, MissingError
from optimize.progress import Progress

if TYPE_CHECKING:
    import torch

    from optimize.compile.bundle import Bundle
    from optimize.compile.records import Artifact
    from optimize.compile.runners import Runner
    from optimize.compile.spec import Component
    from optimize.loading import LoadedBundle
    from optimize.profiles.drawing import Drawing
    from optimize.profiles.images import ImageFigures
    from optimize.profiles.quality import Quality
    from optimize.quantize.measures import Budget

FOLDER = "quality"
STEPS = 25  # of a pipeline's scheduler
DEMO_GUIDANCE = 3.0  # what the demo was trained to be drawn with, see its record.json


@dataclass(frozen=True)
class ArtifactQuality:
    """One ONNX artifact beside the reference on identical inputs; `skipped` says why nothing was measured."""

    artifact: str
    sha256: str
    against: str
    data: str = ""
    outputs: Sequence[Quality] = ()
    skipped: str = ""


@dataclass(frozen=True)
class ImagesQuality:
    """Images of a whole pipeline: `parts` gives the artifact that each of its networks ran as. `variant` is what the
    evaluated artifacts are called after their component's name."""

    variant: str
    against: str
    parts: Mapping[str, str] = field(default_factory=dict)
    drawing: Drawing | None = None
    features: str = ""
    figures: ImageFigures | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `missed` are the budgets that were not met, in words; empty where all were."""

    artifacts: tuple[ArtifactQuality, ...]
    images: tuple[ImagesQuality, ...]
    missed: tuple[str, ...] = ()

    def by_file(self) -> dict[str, ArtifactQuality | ImagesQuality]:
        """Name of a file in `DIR/quality/` -> what is in it."""
        return {
            **{a.artifact.replace("/", "."): a for a in self.artifacts},
            **{f"images/{i.variant}".replace("/", "."): i for i in self.images},
        }

    def as_data(self) -> dict[str, Any]:
        found: dict[str, Any] = plain(asdict(self))
        return found


@dataclass(frozen=True)
class Request:
    """What was asked for, in typed values."""

    against: str
    components: tuple[str, ...]
    precisions: tuple[str, ...]
    calibration: Path | None
    samples: int
    images: int
    seed: int
    features: str | None
    budgets: tuple[Budget, ...]


def evaluate(
    folder: Path | str,
    *,
    against: str = "fp32",
    components: Sequence[str] = (),
    precisions: Sequence[str] = (),
    calibration: Path | str | None = None,
    samples: int = 16,
    images: int | None = None,
    seed: int = 1,
    features: str | None = None,
    budgets: Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a bundle's ONNX artifacts beside one of them and records the figures in `DIR/quality/`.

    Args:
        folder: the bundle.
        against: the precision of the reference, or `eager`, which also stands in where there is no fp32.
        components, precisions: only these; all without.
        calibration: named feeds to measure on, as `optimize record` writes; else data of the source are made, with
            `seed`: never those of a calibration, whatever its seed was.
        samples: how many sets of feeds for each network.
        images: how many images are drawn through the pipeline; as many as samples for the demo, none for others.
        features: a feature network for LPIPS, FID, KID, IS and CLIP score, see `profiles.features`.
        budgets: `cosine>=0.999` and the like: of every output of every artifact, or of the images.

    Raises:
        InputError: the words are wrong. MissingError: a package. GateError: a file is not the one that was proved.
        A budget that is not met stands in the result.
    """
    from optimize.loading import load

    loaded = load(folder, trust_remote_code=trust_remote_code)
    request = request_of(loaded, against, components, precisions, calibration, samples, images, seed, features, budgets)
    shown = progress or Progress(enabled=False)
    chosen = artifacts_of(loaded, request)
    network = network_of(loaded, request)
    measured = [found for name in chosen for found in qualities_of(loaded, name, chosen[name], request, shown)]
    drawn = images_of_bundle(loaded, chosen, network, request, shown)
    result = Evaluation(tuple(measured), tuple(drawn), tuple(missed_of(request.budgets, measured, drawn)))
    for name, found in result.by_file().items():
        record(loaded.bundle, name, found, request)
    return result


def request_of(
    loaded: LoadedBundle,
    against: str,
    components: Sequence[str],
    precisions: Sequence[str],
    calibration: Path | str | None,
    samples: int,
    images: int | None,
    seed: int,
    features: str | None,
    budgets: Sequence[str],
) -> Request:
    """Checks the words against the bundle."""
    from optimize.exporting import choose
    from optimize.profiles.images import SIGNS
    from optimize.quantize.measures import MEASURES, budget_from_text
    from optimize.quantize.texts import check_seed

    check_seed(seed)
    here = {str(a.spec["precision"]) for a in loaded.bundle.artifacts(kind="onnx")}
    for name in components:
        loaded.bundle.component(name)
    choose("precision", precisions, sorted(here))
    if against != "fp32":
        choose("against", [against], sorted({*here, "fp32", "eager"}))
    for word, number, least in (("samples", samples, 1), ("images", images or 0, 0)):
        if number < least:
            raise InputError(f"--{word} is too small", got=number, expected=f"at least {least}")
    if find_spec("torchmetrics") is None:
        raise MissingError("SSIM and the figures of images need torchmetrics", mend='pip install "optimize[quality]"')
    if images is None:
        images = samples if loaded.bundle.manifest.source == "demo" else 0
    signs = {**dict.fromkeys(MEASURES, ">="), **SIGNS}
    return Request(
        against,
        tuple(components),
        tuple(precisions),
        None if calibration is None else Path(calibration),
        samples,
        images,
        seed,
        features,
        tuple(budget_from_text(text, signs) for text in budgets),
    )


def artifacts_of(loaded: LoadedBundle, request: Request) -> dict[str, list[Artifact]]:
    """Component -> its ONNX artifacts that are to be measured: those asked for, less the reference.

    Raises InputError where there is none.
    """
    found: dict[str, list[Artifact]] = {}
    for name in request.components or loaded:
        reference = reference_of(loaded, name, request.against)
        found[name] = [
            a
            for a in loaded[name].artifacts("onnx")
            if a != reference and (not request.precisions or a.spec["precision"] in request.precisions)
        ]
    if not any(found.values()):
        source, root = loaded.bundle.manifest.source, loaded.bundle.root
        raise InputError(
            f"{root} has nothing to measure against {request.against}",
            got=", ".join(a.id for a in loaded.bundle.artifacts(kind="onnx")) or "no ONNX artifact",
            expected="artifacts in another precision",
            mend=f"optimize export {source} --out {root} --precision fp16, or --against eager",
        )
    return {name: artifacts for name, artifacts in found.items() if artifacts}


# --- networks --------------------------------------------------------------------------------------------------------


def reference_of(loaded: LoadedBundle, name: str, against: str) -> Artifact | None:
    """The artifact that others are measured against; None stands for eager fp32."""
    if against == "eager":
        return None
    known = [a for a in loaded[name].artifacts("onnx") if a.spec["precision"] == against]
    if known or against == "fp32":
        return min(known, key=lambda a: len(a.id)) if known else None  # the one with no further words
    return loaded[name].onnx(against)  # raises


def reference_runner(loaded: LoadedBundle, name: str, against: str) -> tuple[str, Runner]:
    """What the reference is called, and its runner."""
    from optimize.compile.runners import EagerRunner
    from optimize.gate import plan_for
    from optimize.loading import component_of

    artifact = reference_of(loaded, name, against)
    if artifact is not None:
        return artifact.id, loaded[name].runner_of(artifact)
    component = component_of(loaded.bundle, name, loaded.trust_remote_code)
    return "eager fp32", EagerRunner(component, "fp32", streamed=plan_for(component).streamed)


def qualities_of(
    loaded: LoadedBundle, name: str, artifacts: Sequence[Artifact], request: Request, progress: Progress
) -> Iterator[ArtifactQuality]:
    """Each artifact of a component beside the reference, on the same feeds."""
    from optimize.compile.bundle import scratch
    from optimize.profiles.quality import keep_outputs, qualities

    against, runner = reference_runner(loaded, name, request.against)
    with progress.step(f"{name}: data"):
        data, samples = data_of(loaded, name, request, progress)
    with scratch(loaded.bundle.root / FOLDER, ".outputs-") as folder:
        with progress.step(against):
            keep_outputs(runner, samples, folder)
        for artifact in artifacts:
            with progress.step(f"{artifact.id} beside {against}"):
                try:
                    found = qualities(loaded[name].runner_of(artifact), samples, folder, loaded[name].record.role)
                    yield ArtifactQuality(artifact.id, artifact.sha256, against, data, found)
                except MissingError as e:  # bf16 here
                    yield ArtifactQuality(artifact.id, artifact.sha256, against, data, skipped=e.what)


def data_of(
    loaded: LoadedBundle, name: str, request: Request, progress: Progress
) -> tuple[str, Iterable[Mapping[str, torch.Tensor]]]:
    """How the data came about, and the feeds, which can be gone through again and again."""
    from optimize.loading import component_of, recorded_component, source_of
    from optimize.quantize.data import feeds_from_file, feeds_of
    from optimize.quantize.texts import MEASURED

    try:
        component = component_of(loaded.bundle, name, loaded.trust_remote_code)
        source = source_of(loaded.bundle, (name,), loaded.trust_remote_code)
    except (InputError, MissingError) as e:  # the artifacts can be measured without what they were made of
        component, source = recorded_component(loaded.bundle, name), None
        why = e.what
    if request.calibration is not None:
        given = feeds_from_file(component, request.calibration)
        return given.how, given
    if source is None:
        return f"synthetic: {why}", drawn_feeds(component, request)
    folder = loaded.bundle.root / FOLDER / "feeds" / name
    seed = MEASURED + request.seed
    made = feeds_of(component, source, folder, samples=request.samples, seed=seed, say=progress.say)
    return made.how, made


def drawn_feeds(component: Component, request: Request) -> list[dict[str, torch.Tensor]]:
    """Random feeds of the right kinds, at sizes that were not traced."""
    from optimize.compile.feeds import feeds_for

    sizes = component.shape_sets()["untraced"]
    return [feeds_for(component.inputs, sizes, "fp32", 1000 * request.seed + i) for i in range(request.samples)]


# --- images ----------------------------------------------------------------------------------------------------------


def network_of(loaded: LoadedBundle, request: Request) -> torch.nn.Module | None:
    """The feature network that the user names, or the demo's own where images of it will be drawn."""
    from optimize.profiles.features import digit_features, network_from_text

    if request.features is not None:
        return network_from_text(request.features)
    return digit_features() if loaded.bundle.manifest.source == "demo" and request.images else None


def images_of_bundle(
    loaded: LoadedBundle,
    chosen: Mapping[str, Sequence[Artifact]],
    network: torch.nn.Module | None,
    request: Request,
    progress: Progress,
) -> list[ImagesQuality]:
    """The pipeline's images through each variant's artifacts beside the reference's images. A network that has no
    artifact of the variant runs as the reference."""
    from optimize.profiles.drawing import DRAWN

    drawn = [name for name in loaded if loaded[name].record.role in DRAWN]
    variants: dict[str, dict[str, Artifact]] = {}
    for name in drawn:
        for artifact in chosen.get(name, ()):
            variants.setdefault(artifact.id.partition("/")[2], {})[name] = artifact
    against = f"{request.against} of {', '.join(drawn)}"
    why = why_no_images(loaded, request)
    if why or not variants:
        return [ImagesQuality(variant, against, skipped=why or "") for variant in variants]
    return list(images_of_variants(loaded, drawn, variants, network, request, progress))


def why_no_images(loaded: LoadedBundle, request: Request) -> str | None:
    from optimize.loading import source_of
    from optimize.profiles.drawing import why_not_drawn

    try:
        folder = source_of(loaded.bundle, tuple(loaded), loaded.trust_remote_code).folder
    except (InputError, MissingError) as e:
        return e.what
    why = why_not_drawn(folder, {name: loaded[name].record for name in loaded})
    if why is None and not request.images:
        return f"--images N draws N of them, {STEPS} steps each"
    return why


def images_of_variants(
    loaded: LoadedBundle,
    drawn: Sequence[str],
    variants: Mapping[str, Mapping[str, Artifact]],
    network: torch.nn.Module | None,
    request: Request,
    progress: Progress,
) -> Iterator[ImagesQuality]:
    from optimize.profiles.drawing import drawing_of
    from optimize.profiles.images import image_figures
    from optimize.quantize.texts import DIGITS, PROMPTS

    demo = loaded.bundle.manifest.source == "demo"
    drawing = drawing_of(
        {name: loaded[name].record for name in drawn},
        request.images,
        request.seed,
        DIGITS if demo else PROMPTS,
        STEPS,
        DEMO_GUIDANCE if demo else None,
    )

    def images(artifacts: Mapping[str, Artifact]) -> tuple[dict[str, str], torch.Tensor]:
        runners = {
            name: (artifacts[name].id, loaded[name].runner_of(artifacts[name]))
            if name in artifacts
            else reference_runner(loaded, name, request.against)
            for name in drawn
        }
        found = images_through(loaded, {name: runner for name, (_, runner) in runners.items()}, drawing, progress)
        return {name: id_ for name, (id_, _) in runners.items()}, found

    try:
        with progress.step("images of the reference"):
            against, exact = images({})
    except InputError as e:  # the artifacts do not take the sizes that the pipeline runs at
        yield from (ImagesQuality(variant, request.against, skipped=f"{e.what} ({e.got})") for variant in variants)
        return
    for variant, artifacts in variants.items():
        with progress.step(f"images of {variant}"):
            try:
                parts, got = images(artifacts)
            except (InputError, MissingError) as e:
                yield ImagesQuality(variant, ", ".join(against.values()), skipped=e.what)
                continue
            figures = image_figures(got, exact, drawing.prompts, network)
        features = request.features or ("the demo's, fitted to scikit-learn's digits" if demo else "")
        yield ImagesQuality(variant, ", ".join(against.values()), parts, drawing, features, figures)


def images_through(
    loaded: LoadedBundle, runners: Mapping[str, Runner], drawing: Drawing, progress: Progress
) -> torch.Tensor:
    """`[n, channels, height, width]` in 0..1 from the bundle's pipeline, with these runners by component."""
    from optimize.loading import component_of, source_of
    from optimize.profiles.drawing import images_of

    folder = source_of(loaded.bundle, tuple(runners), loaded.trust_remote_code).folder
    if folder is None:
        raise InputError("the bundle's source is no pipeline", got=loaded.bundle.manifest.source, expected="a folder")
    parts = {
        name: (component_of(loaded.bundle, name, loaded.trust_remote_code), runner) for name, runner in runners.items()
    }
    return images_of(folder, parts, drawing, progress.say)


# --- budgets and records ---------------------------------------------------------------------------------------------


def missed_of(
    budgets: Iterable[Budget], artifacts: Sequence[ArtifactQuality], images: Sequence[ImagesQuality]
) -> Iterator[str]:
    """Each budget that is not met: by what, with which figure. What was not measured does not meet one either."""
    from optimize.quantize.measures import MEASURES

    for budget in budgets:
        figures: list[tuple[str, float | None, str]] = []
        if budget.figure in MEASURES:
            figures += [
                (f"{a.artifact} {o.output}", o.figures.get(budget.figure), "") for a in artifacts for o in a.outputs
            ]
            figures = [f for f in figures if f[1] is not None]  # a text has no SSIM
            figures += [(a.artifact, None, a.skipped) for a in artifacts if a.skipped]
        else:
            for i in images:
                got = i.figures.figures.get(budget.figure) if i.figures else None
                why = i.figures.skipped.get(budget.figure, "") if i.figures else i.skipped
                figures.append((f"images of {i.variant}", got, why))
        if not figures:
            yield f"{budget}: nothing has this figure"
        for what, value, why in figures:
            if value is None:
                yield f"{budget}: {what}: not measured: {why}"
            elif not budget.met(value):
                yield f"{budget}: {what}: {value:.10g}"


def record(bundle: Bundle, name: str, found: ArtifactQuality | ImagesQuality, request: Request) -> None:
    """`DIR/quality/unet.int8.json`, `DIR/quality/images.int8.json`: whole or not at all."""
    from optimize.compile.bundle import disk_errors

    path = bundle.root / FOLDER / f"{name}.json"
    asked = {"samples": request.samples, "images": request.images, "seed": request.seed}
    text = json.dumps({**plain(asdict(found)), "asked": asked, "versions": environment()}, indent=1)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(bundle.root):
        path.parent.mkdir(exist_ok=True)
        try:
            temporary.write_text(text + "\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def environment() -> dict[str, str]:
    from optimize.exporting import versions

    found = dict(versions())
    for name in ("onnxruntime", "onnxruntime-gpu", "torchmetrics", "scikit-learn", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def plain(value: Any) -> Any:
    """Data that JSON has words for: numbers that are not finite become "inf", "-inf" and "nan"."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
