"""Images through a diffusers pipeline whose networks are runners: its own loop, scheduler, tokenizers; our artifacts.

A network of the pipeline stays as an object with its config and no weights (its memory is never touched); only its
`forward`, or a VAE's `decode`, is replaced.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimize.compile.records import ComponentRecord
from optimize.compile.runners import Runner
from optimize.compile.spec import Component
from optimize.compile.streaming import set_tensor
from optimize.errors import InputError
from optimize.quantize.fit import check_axes, sizes_of, split_batch
from optimize.quantize.recording import arguments_of, feeds_from_call, modules_of

DENOISERS = ("unet", "dit")
DRAWN = (*DENOISERS, "text_encoder", "vae_decoder")
"""Roles that a pipeline from text to an image is made of."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn: a prompt and a seed per image. `guidance` None is the pipeline's own; sizes are in pixels."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float | None
    height: int
    width: int
    batch: int


def why_not_drawn(folder: Path | None, components: Mapping[str, ComponentRecord]) -> str | None:
    """Why no image can be drawn through these components of the source in `folder`; None where it can."""
    if folder is None or not (folder / "model_index.json").exists():
        return "the source is no pipeline of diffusers"
    roles = {c.role for c in components.values()}
    if "vae_decoder" not in roles or not roles.intersection(DENOISERS):
        return "the bundle has no denoiser with a VAE's decoder"
    parameters = inspect.signature(pipeline_class(folder).__call__).parameters
    if "prompt" not in parameters or "image" in parameters:
        return f"{pipeline_class(folder).__name__} draws not from a prompt alone"
    return None


def pipeline_class(folder: Path) -> Any:
    import diffusers

    name = diffusers.DiffusionPipeline.load_config(str(folder), local_files_only=True)["_class_name"]
    found = getattr(diffusers, name if isinstance(name, str) else "", None)
    if found is None:
        raise InputError(
            "the pipeline's class is none of diffusers", got=name, expected="a class of the installed version"
        )
    return found


def images_of(
    folder: Path, parts: Mapping[str, tuple[Component, Runner]], drawing: Drawing, say: Callable[[str], None]
) -> torch.Tensor:
    """`[n, channels, height, width]` in 0..1: the drawing through the pipeline in `folder`.

    `parts` gives by component name each network that the pipeline has to call, and the runner that stands in for it.
    """
    with pipeline_of(folder, parts) as pipeline:
        return drawn(pipeline, drawing, say)


def drawn(pipeline: Any, drawing: Drawing, say: Callable[[str], None]) -> torch.Tensor:
    """The same through a pipeline that is there."""
    images = []
    takes = inspect.signature(pipeline.__call__).parameters
    words = {
        "num_inference_steps": drawing.steps,
        "height": drawing.height,
        "width": drawing.width,
        "output_type": "pt",
        "use_resolution_binning": False,  # PixArt's: it would change the sizes
        **({} if drawing.guidance is None else {"guidance_scale": drawing.guidance}),
    }
    for i in range(0, len(drawing.prompts), drawing.batch):
        say(f"image {i + 1} of {len(drawing.prompts)}")
        with torch.inference_mode():
            images.append(
                pipeline(
                    prompt=list(drawing.prompts[i : i + drawing.batch]),
                    generator=[torch.Generator().manual_seed(s) for s in drawing.seeds[i : i + drawing.batch]],
                    **{k: v for k, v in words.items() if k in takes},
                ).images.float()
            )
    return torch.cat(images)


@contextlib.contextmanager
def pipeline_of(folder: Path, parts: Mapping[str, tuple[Component, Runner]], device: str = "cpu") -> Iterator[Any]:
    """The diffusers pipeline in `folder` with runners for networks. The weights of those are not read."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    cls = pipeline_class(folder)
    config = cls.load_config(str(folder), local_files_only=True)
    with contextlib.ExitStack() as stack:
        given: dict[str, Any] = {}
        for name, (component, runner) in parts.items():
            part, method = ("vae", "decode") if component.role == "vae_decoder" else (name, "forward")
            given[part] = stand_in(component, stack.enter_context(runner), method, device)
        if "safety_checker" in config:  # it would blacken what is to be compared
            given |= {"safety_checker": None, "requires_safety_checker": False}
        pipeline = cls.from_pretrained(str(folder), local_files_only=True, **given)
        pipeline.set_progress_bar_config(disable=True)
        for part, module in modules_of(pipeline).items():
            if part not in given:
                module.to(device)
        yield pipeline


def stand_in(component: Component, runner: Runner, method: str, device: str = "cpu") -> torch.nn.Module:
    """The component's torch module without weights, whose `method` runs `runner` instead."""
    module: torch.nn.Module = component.build()
    module.__dict__.pop("forward", None)  # the adapter's

    def forward(*args: Any, **kwargs: Any) -> Any:
        values = arguments_of(module, args, kwargs)
        return answer(feeds_from_call(component.inputs, values, device), values)

    def decode(z: torch.Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        return answer({component.inputs[0].name: z}, {"return_dict": return_dict})

    def answer(feeds: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> Any:
        """In parts, where the artifact takes fewer rows at once than the pipeline gives it."""
        parts = []
        for _, rows in split_batch(component.inputs, component.axes, feeds):
            check_axes(sizes_of(component.inputs, {n: t.shape for n, t in rows.items()}), component.axes)
            parts.append(dict(runner.infer(rows)))
        return RESULTS[component.role]({n: torch.cat([p[n] for p in parts]).float() for n in parts[0]}, values)

    module.__dict__[method] = {"forward": forward, "decode": decode}[method]
    return module.to_empty(device="cpu") if device == "cpu" else hollow(module, device)


def hollow(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """On the device as far as its first parameter, by which a pipeline goes, and on meta for the rest: what nobody
    writes takes no memory on a CPU, but it does on a GPU."""
    first = next((name for name, _ in module.named_parameters()), None)
    module.to_empty(device="meta")
    if first is not None:
        set_tensor(module, first, torch.empty_like(module.get_parameter(first), device=device))
    return module


def denoised(outputs: Mapping[str, torch.Tensor], call: Mapping[str, Any]) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    sample = outputs["out_sample"]
    return Transformer2DModelOutput(sample) if call.get("return_dict", True) else (sample,)


def encoded(outputs: Mapping[str, torch.Tensor], call: Mapping[str, Any]) -> Any:
    """What transformers gives; of all hidden states the last but one, which is what diffusers reads."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    named = dict(outputs)
    states = (named.pop("penultimate_hidden_state", None), named["last_hidden_state"])
    kind = CLIPTextModelOutput if "text_embeds" in named else BaseModelOutputWithPooling
    return kind(**named, hidden_states=states)


def decoded(outputs: Mapping[str, torch.Tensor], call: Mapping[str, Any]) -> Any:
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(outputs["sample"]) if call.get("return_dict", True) else (outputs["sample"],)


RESULTS: Mapping[str, Callable[[Mapping[str, torch.Tensor], Mapping[str, Any]], Any]] = {
    "unet": denoised,
    "dit": denoised,
    "text_encoder": encoded,
    "vae_decoder": decoded,
}
"""Role -> the object that a pipeline expects of such a network's call."""


def drawing_of(
    components: Mapping[str, ComponentRecord],
    count: int,
    seed: int,
    prompts: Sequence[str],
    steps: int,
    guidance: float | None,
) -> Drawing:
    """`count` images of the prompts in turn, at the sizes that the artifacts are tuned for, in batches they take."""
    sized = next(c.axes for role in DRAWN for c in components.values() if c.role == role and "height" in c.axes)
    most = min(
        c.axes["batch"].max // (2 if c.role in DENOISERS else 1)  # guidance doubles the denoiser's
        for c in components.values()
        if c.role in DRAWN and "batch" in c.axes
    )
    return Drawing(
        prompts=tuple(prompts[i % len(prompts)] for i in range(count)),
        seeds=tuple(range(1000 * seed, 1000 * seed + count)),
        steps=steps,
        guidance=guidance,
        height=sized["height"].opt,
        width=sized["width"].opt,
        batch=max(most, 1),
    )
