"""A diffusers pipeline runs over prompts while its networks' feeds are recorded: spread over prompts and timesteps."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimize.compile.sources import Source, demo_folder
from optimize.compile.spec import Axis
from optimize.errors import InputError

from .recording import DENOISERS, Recorder, Site, modules_of, sites_of_pipeline
from .sets import SetWriter
from .synthetic import SMALL, spread
from .texts import DIGITS, PROMPTS, share_of

Say = Callable[[str], None]
INDEX = "model_index.json"
STEPS = 8
"""Denoising steps of a run; some runs have up to three more, so that the timesteps differ."""
EACH = 3
"""Samples that a small denoiser gives in a run; a large one gives all `STEPS`, because fewer runs are quicker."""
SIDE = 256
"""Pixels at which a denoiser of more than `SMALL` parameters runs; a smaller one has the size that it was made for."""
TOKEN = 16
"""Pixels along a side of an image token of FLUX."""


class EnoughError(Exception):
    """Raised inside a pipeline that has computed all that was wanted of it."""


@dataclass(frozen=True)
class Plan:
    """How a pipeline runs: `prompts` in turn, and what else its call is given."""

    prompts: tuple[str, ...]
    words: Mapping[str, Any]

    @staticmethod
    def for_source(source: Source, seed: int, prompts: Sequence[str] = ()) -> Plan:
        """The user's prompts in their order; else the seed's share of the demo's own or general ones, shuffled."""
        demo = source.folder is not None and source.folder.resolve() == demo_folder().resolve()
        known = share_of(DIGITS if demo else PROMPTS, seed)
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
        return Plan(tuple(prompts) or tuple(known[i] for i in order), {"guidance_scale": 3.0} if demo else {})


def has_pipeline(folder: Path | None) -> bool:
    return folder is not None and (folder / INDEX).is_file()


def load_pipeline(folder: Path, *, pickles: bool = False) -> Any:
    """The diffusers pipeline of a folder in fp32, from its files alone. Raises InputError where diffusers cannot."""
    from diffusers import DiffusionPipeline

    from optimize.compile.sources import read_json

    words: dict[str, Any] = {}
    if "safety_checker" in read_json(folder / INDEX):
        words = {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=None if pickles else True, **words
        )
    except Exception as e:  # diffusers raises whatever its parts do: each means that this pipeline cannot run here
        raise InputError(
            f"the pipeline in {folder} cannot be loaded, so there are no real data of it",
            got=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}",
            expected="all parts that model_index.json names, with weights, tokenizers and scheduler",
            mend="complete the folder, or give --calibration FILE",
        ) from e
    pipe.set_progress_bar_config(disable=True)
    for module in modules_of(pipe).values():
        module.float()  # transformers loads what the file has
    return pipe


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """diffusers and transformers without progress bars and warnings: prompts are cut, types changed, all on purpose."""
    import diffusers.utils.logging as one
    import transformers.utils.logging as other

    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in (one, other)]
    for library, _, _ in before:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def record_runs(
    pipe: Any, sites: Sequence[Site], writers: Mapping[str, SetWriter], plan: Plan, samples: int, seed: int, say: Say
) -> dict[str, str]:
    """Runs the pipeline until each site's writer has `samples`, or nothing new is to be expected.

    Gives what was left out, by component, and why. Goes on at the run at which the writers' last one stopped.
    """
    denoiser = next((s.module for s in sites_of_pipeline(pipe) if s.role in ("unet", "dit")), None)
    roles = {s.role for s in sites}
    runs = samples if roles - set(DENOISERS) else math.ceil(samples / (STEPS if is_big(denoiser) else EACH))
    texts_only = roles <= {"text_encoder"} and denoiser is not None
    if texts_only:
        runs = min(runs, len(plan.prompts))
    each = math.ceil(samples / runs)
    size = image_size(pipe, sites)
    recorder = Recorder(sites, writers, lambda site, call: wanted(pipe, site, call, each, recorder.note["run"]), True)
    begin = min((next_run(w) for w in writers.values() if not w.full), default=runs)
    with recorder, stopped_at(denoiser if texts_only else None):
        for run in itertools.takewhile(lambda _: not all(w.full for w in writers.values()), range(begin, runs)):
            prompt = plan.prompts[run % len(plan.prompts)]
            say(f"recording: run {run + 1} of {runs}")
            recorder.calls.clear()
            recorder.note = {"run": run, "prompt": prompt}
            words = {**call_words(size, seed, run, each, latent=roles <= set(DENOISERS)), **plan.words}
            call(pipe, {**words, "prompt": prompt})
    return recorder.left_out


def next_run(writer: SetWriter) -> int:
    """The run of the last sample, which may have had more of them."""
    return int(writer.notes[-1].get("run", 0)) if writer.notes else 0


def wanted(pipe: Any, site: Site, call: int, each: int, run: int) -> bool:
    """All calls, but of a denoiser's `each` per run, spread over the steps."""
    if site.role not in DENOISERS:
        return True
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", ())
    return call in spread(each, max(len(timesteps), 1), run)


def call_words(size: tuple[int, int], seed: int, run: int, each: int, *, latent: bool) -> dict[str, Any]:
    """What the call of any pipeline may be given; `call` takes those that its own has."""
    return {
        "height": size[0],
        "width": size[1],
        "num_inference_steps": max(STEPS, each) + run % 4,
        "generator": torch.Generator().manual_seed(seed * 1_000_003 + run),
        "output_type": "latent" if latent else "pt",
        "class_labels": [run],
        "use_resolution_binning": False,  # PixArt: the size asked for, not the nearest of its own
        "clean_caption": False,
    }


def call(pipe: Any, words: Mapping[str, Any]) -> None:
    """One run. Raises InputError for a pipeline that needs more than words, and for one that fails."""
    known = inspect.signature(type(pipe).__call__).parameters
    needed = [n for n, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    lacking = [n for n in needed[1:] if n not in words]
    mend = "run it yourself (with optimize.record(pipe, DIR): pipe(...)) and give --calibration DIR"
    if lacking:
        raise InputError(
            f"{type(pipe).__name__} needs more than a prompt",
            got=", ".join(lacking),
            expected="text to image",
            mend=mend,
        )
    try:
        with torch.no_grad():
            pipe(**{n: v for n, v in words.items() if n in known})
    except EnoughError:
        pass
    except (InputError, MemoryError, OSError):
        raise
    except Exception as e:
        raise InputError(
            f"{type(pipe).__name__} failed while its feeds were recorded",
            got=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}",
            expected="a pipeline that draws from a prompt at " + "x".join(str(words[n]) for n in ("height", "width")),
            mend=mend,
        ) from e


def story(notes: Sequence[Mapping[str, Any]]) -> str:
    """What the notes of recorded samples say in a line: `32 samples, 4 runs, 4 prompts, timesteps 999 to 1`."""
    runs, prompts = ({n[k] for n in notes if k in n} for k in ("run", "prompt"))
    times = [n["timestep"] for n in notes if "timestep" in n]
    said = f", timesteps {max(times):g} to {min(times):g}" if times else ""
    counts = ((len(notes), "sample"), (len(runs), "run"), (len(prompts), "prompt"))
    return ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in counts) + said


@contextmanager
def stopped_at(module: torch.nn.Module | None) -> Iterator[None]:
    """Ends a run when it comes to this module: nothing of what follows is wanted."""

    def stop(*_: Any) -> None:
        raise EnoughError

    handle = module.register_forward_pre_hook(stop) if module is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


# --- sizes ------------------------------------------------------------------------------------------------------------


def image_size(pipe: Any, sites: Sequence[Site]) -> tuple[int, int]:
    """(height, width) in pixels that the sites' axes and the pipeline's denoiser take, small for a big model."""
    mine = {s.name: s for s in sites}
    drawn = [mine.get(s.name, s) for s in sites_of_pipeline(pipe) if s.role in DENOISERS]
    big = any(is_big(s.module) for s in drawn)
    flat = next((s.axes["image_tokens"] for s in drawn if "image_tokens" in s.axes), None)
    if flat is not None and not any("height" in s.axes for s in sites):
        return image_of_tokens(flat)
    step = TOKEN if flat is not None else 1
    known = [s.axes for s in (*drawn, *sites)]
    height, width = (side([a[name] for a in known if name in a], step, big) for name in ("height", "width"))
    return height, width


def is_big(denoiser: torch.nn.Module | None) -> bool:
    return denoiser is not None and sum(p.numel() for p in denoiser.parameters()) > SMALL


def side(axes: Sequence[Axis], step: int, big: bool) -> int:
    """What the first axis was made for, or `SIDE`; within all ranges and a multiple of all steps, where that can be."""
    if not axes:
        return SIDE
    low, high, step = max(a.min for a in axes), min(a.max for a in axes), math.lcm(step, *(a.step for a in axes))
    wish = min(axes[0].opt, SIDE) if big else axes[0].opt
    return max(-(-low // step), min(wish, high) // step) * step


def image_of_tokens(axis: Axis) -> tuple[int, int]:
    """The most nearly square image of as many tokens as `SIDE` pixels have, or the axis allows."""
    count = max(axis.min, min(axis.opt, (SIDE // TOKEN) ** 2))
    rows = next(r for r in range(math.isqrt(count), 0, -1) if count % r == 0)
    return TOKEN * rows, TOKEN * (count // rows)
