"""Where a component's calibration data come from: its own pipeline, real text, a user's file, or what it makes itself.

`feeds_of` makes a set once and finds it again; `feeds_from_file` reads what somebody gives, and refuses what cannot be
right. `WAYS` is the list of sources of data, the first that applies is taken, and each says in the set's `how` what it
is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimize.compile.digests import digest_of_file
from optimize.compile.sources import Source
from optimize.compile.spec import Component
from optimize.errors import InputError

from . import language, pipelines, synthetic
from .fit import check_feeds
from .recording import check_new, counted, site_of_component
from .sets import (
    ABOUT,
    CalibrationSet,
    Sample,
    SetWriter,
    arrays_of_npz,
    content_digest,
    read_about,
    read_set,
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Way:
    """`applies(component, source)`; `make(writer, component, source, seed, say)` fills the writer; `how` it is said."""

    how: str
    applies: Callable[[Component, Source], bool]
    make: Callable[[SetWriter, Component, Source, int, Say], None]


def from_pipeline(writer: SetWriter, component: Component, source: Source, seed: int, say: Say) -> None:
    left_out = record_into({component.name: writer}, [component], source, (), seed, say)
    check_recorded(writer, left_out.get(component.name))


def record_into(
    writers: Mapping[str, SetWriter],
    components: Sequence[Component],
    source: Source,
    prompts: Sequence[str],
    seed: int,
    say: Say,
) -> dict[str, str]:
    """Runs the source's pipeline, and each component's writer gets what flows in. Gives what was left out, and why."""
    assert source.folder is not None
    say("loading the pipeline")
    with pipelines.quiet_libraries():
        pipe = pipelines.load_pipeline(source.folder, pickles=any(c.weights.kind == "memory" for c in components))
        sites = [site_of_component(c, pipe) for c in components]
        plan = pipelines.Plan.for_source(source, seed, prompts)
        samples = max(w.total or 0 for w in writers.values())
        left_out = pipelines.record_runs(pipe, sites, writers, plan, samples, seed, say)
    for writer in writers.values():
        writer.how = f"recorded from {type(pipe).__name__}, {pipelines.story(writer.notes)}"
    return left_out


def check_recorded(writer: SetWriter, why: str | None) -> None:
    """Raises InputError where a pipeline gave a component nothing that it takes."""
    if not writer.notes:
        raise InputError(
            f"the pipeline gave no feeds for {writer.component}",
            got=why or "it was never called",
            expected="calls within the component's axes",
            mend="give --axis sizes that the pipeline uses, or --calibration FILE",
        )


def from_sentences(writer: SetWriter, component: Component, source: Source, seed: int, say: Say) -> None:
    assert source.folder is not None
    language.sentences(writer, component, source.folder, seed)


def from_text(writer: SetWriter, component: Component, source: Source, seed: int, say: Say) -> None:
    assert source.folder is not None
    language.continuations(writer, component, language.real_words(source.folder, seed))


def from_ids(writer: SetWriter, component: Component, source: Source, seed: int, say: Say) -> None:
    language.continuations(writer, component, language.random_words(component, seed))


def is_text(component: Component, source: Source) -> bool:
    return component.role == "text_encoder" and language.has_tokenizer(source.folder)


def is_image(component: Component, _: Source) -> bool:
    return component.role in ("vae_encoder", "vae_decoder", "vision_encoder") and len(component.inputs) == 1


WAYS: tuple[Way, ...] = (
    Way("recorded from the pipeline", lambda c, s: pipelines.has_pipeline(s.folder), from_pipeline),
    Way("sentences through the model's tokenizer, padded to several lengths", is_text, from_sentences),
    Way(
        "text through the model's tokenizer, prefill and decode; the past is the model's own",
        lambda c, s: c.role == "lm" and language.has_tokenizer(s.folder),
        from_text,
    ),
    Way(
        "synthetic: random token ids, prefill and decode; the past is the model's own",
        lambda c, s: c.role == "lm",
        from_ids,
    ),
    Way(
        "synthetic: trajectories that the network walks from noise by itself; its conditions are random",
        lambda c, s: synthetic.is_denoiser(c),
        lambda writer, component, source, seed, say: synthetic.trajectories(writer, component, seed, say),
    ),
    Way(
        "synthetic: smooth random images or latents",
        is_image,
        lambda writer, component, source, seed, say: synthetic.images(writer, component, seed),
    ),
    Way(
        "synthetic: random numbers of each input's kind",
        lambda c, s: True,
        lambda writer, component, source, seed, say: synthetic.draws(writer, component, seed),
    ),
)


def feeds_of(
    component: Component,
    source: Source,
    folder: Path,
    *,
    samples: int = 32,
    seed: int = 0,
    say: Say = lambda _: None,
) -> CalibrationSet:
    """At most `samples` sets of feeds for the component, made once into `folder` and found again there.

    A pipeline may have fewer that differ (ten prompts are ten sets of ids). Raises InputError for no samples asked for,
    and where a source that should have real data cannot give them.
    """
    if samples < 1:
        raise InputError("no samples were asked for", got=samples, expected="1 or more", mend="--samples 32")
    way = next(w for w in WAYS if w.applies(component, source))
    key = {**key_of(component, source, way), "samples": samples, "seed": seed}
    with SetWriter(folder, component.name, key, total=samples, seed=seed) as writer:
        if not writer.full:
            writer.how = way.how
            way.make(writer, component, source, seed, say)
    return read_set(folder, component.name)


def record_source(
    components: Sequence[Component],
    source: Source,
    folder: Path,
    *,
    prompts: Sequence[str] = (),
    samples: int = 32,
    seed: int = 0,
    say: Say = lambda _: None,
) -> tuple[dict[str, CalibrationSet], dict[str, str]]:
    """Sets of several components from the same runs of the source's pipeline, each in its own folder in `folder`.

    Gives the sets, and for components without one why. Raises InputError for a source that has no pipeline.
    """
    if not pipelines.has_pipeline(source.folder):
        raise InputError(
            f"{source.text} has no pipeline to run",
            got="no model_index.json",
            expected="demo, or a folder or hub id of a diffusers pipeline",
            mend="`optimize quantize` makes data for other sources by itself",
        )
    way = WAYS[0]
    with ExitStack() as stack:
        writers = {}
        for c in components:
            beside = sorted(other.name for other in components)  # decides the runs, and each one's samples
            key = {
                **key_of(c, source, way),
                "samples": samples,
                "seed": seed,
                "prompts": list(prompts),
                "beside": beside,
            }
            check_same(folder / c.name, {"component": c.name, **key})
            writer = SetWriter(folder / c.name, c.name, key, total=samples, seed=seed)
            writers[c.name] = stack.enter_context(writer)
        left_out = {}
        if not all(w.full for w in writers.values()):
            left_out = record_into(writers, components, source, prompts, seed, say)
    made = {name: read_set(folder / name, name) for name, w in writers.items() if w.notes}
    never = {name: left_out.get(name, "it was never called") for name in writers if name not in made}
    return made, never


def check_same(folder: Path, key: Mapping[str, Any]) -> None:
    """Raises InputError for a folder with a finished set of another making, which nobody asked to replace."""
    about = read_about(folder)
    if about is not None and about["key"] != json.loads(json.dumps(key)):
        check_new(folder)


def key_of(component: Component, source: Source, way: Way) -> dict[str, str]:
    """What the data depend on: the weights of all that ran, the configs and texts beside them, sizes."""
    recorded = way.make is from_pipeline
    ran = source.components if recorded else (component,)
    config = json.dumps(component.config, sort_keys=True, default=str)
    return {
        "way": way.how,
        "weights": digest("".join(c.weights.digest() for c in ran)),
        "files": folder_digest(source.folder),
        "config": digest(config),
        "axes": json.dumps({n: asdict(a) for n, a in component.axes.items()}, sort_keys=True),
    }


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_digest(folder: Path | None) -> str:
    """Of the configs, vocabularies and schedules in a source's folder."""
    if folder is None:
        return ""
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".txt", ".model") and p.is_file())
    return digest("".join(f"{p.relative_to(folder)}{digest_of_file(p)}" for p in paths))


# --- what the user gives ----------------------------------------------------------------------------------------------

KINDS = (".safetensors", ".npz")


def feeds_from_file(component: Component, path: Path | str) -> CalibrationSet:
    """A user's feeds: a .safetensors or .npz of arrays by input name, a folder of such files, or a calibration set.

    A file is one sample, or where all its arrays have one dim more than the component's inputs, as many as that
    leading dim says. Every sample is read once and checked. Raises InputError, which names file and tensor, for names,
    types, ranks and sizes that do not fit, numbers that are not finite, no samples, and samples that are all the same.
    """
    path = Path(path)
    found = set_from_path(component, path)
    seen = set()
    for sample, feeds in zip(found.samples, found, strict=True):
        with said_of(sample):
            seen.add(content_digest(check_feeds(component.inputs, component.axes, feeds)))
    if not len(found):
        raise InputError(f"{path} has no samples", got="0", expected="1 or more", mend="record some, or leave it out")
    if len(found) > 1 and len(seen) == 1:
        raise InputError(
            f"all {len(found)} samples of {path} are the same",
            got="equal feeds",
            expected="samples that differ, as the inputs in use do",
            mend="look at how they were made",
        )
    return CalibrationSet(found.component, found.how, found.samples, found.seed, dtypes_of(component))


def set_from_path(component: Component, path: Path) -> CalibrationSet:
    """The samples of a path, unchecked."""
    for folder in (path, path / component.name):
        if read_about(folder) is not None:
            return read_set(folder, component.name)
    files = files_of(path)
    samples = tuple(sample for file in files for sample in samples_of(component, file))
    return CalibrationSet(component.name, f"given: {path.name}, {counted(samples)}", samples)


def files_of(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(
            f"there is no {path}", expected="a .safetensors or .npz file, or a folder of them", mend="check the path"
        )
    files = sorted(p for p in path.iterdir() if p.suffix in KINDS) if path.is_dir() else [path]
    wrong = [p for p in files if p.suffix not in KINDS]
    if wrong or not files:
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:4]) if path.is_dir() else path.name
        raise InputError(
            f"{path} holds no calibration data",
            got=inside or "an empty folder",
            expected=f".safetensors or .npz files, or a calibration set ({ABOUT})",
            mend="numpy.savez(FILE, name=array, ...) writes one sample",
        )
    return files


def samples_of(component: Component, path: Path) -> Iterator[Sample]:
    """One sample of a file, or one per entry of a dim before those of the component."""
    shapes = shapes_of(path)
    ranks = {t.name: len(t.shape) for t in component.inputs}
    stacked = bool(shapes) and all(len(s) == ranks.get(n, -2) + 1 for n, s in shapes.items())
    if not stacked:
        yield Sample(path)
        return
    counts = {s[0] for s in shapes.values()}
    if len(counts) > 1:
        raise InputError(
            f"the arrays of {path} have different numbers of samples",
            got=", ".join(f"{n} {s[0]}" for n, s in shapes.items()),
            expected="the same leading dim in all of them",
            mend="write each sample as a whole",
        )
    yield from (Sample(path, row) for row in range(counts.pop()))


def shapes_of(path: Path) -> Mapping[str, tuple[int, ...]]:
    if path.suffix == ".npz":
        return {n: tuple(t.shape) for n, t in arrays_of_npz(path).items()}
    from optimize.compile.weights import header_of_safetensors

    return {n: tuple(entry["shape"]) for n, entry in header_of_safetensors(path).items()}


@contextmanager
def said_of(sample: Sample) -> Iterator[None]:
    """Names the file, and the sample in it, in an error about feeds."""
    try:
        yield
    except InputError as e:
        row = "" if sample.row is None else f", sample {sample.row}"
        raise InputError(f"{sample.path}{row}: {e.what}", got=e.got, expected=e.expected, mend=e.mend) from e


def dtypes_of(component: Component) -> dict[str, str]:
    return {t.name: t.torch_dtype("fp32") for t in component.inputs}
