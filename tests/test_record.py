"""Recording a running pipeline: tiny pipelines of the classes that diffusers has, put together from `arch:` networks.

What is recorded has to be what the module was given: the component's eager forward on recorded feeds must give what the
pipeline's own module gave.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import optimize
from optimize.compile.architectures import ARCHITECTURES, PIPELINES
from optimize.compile.runners import EagerRunner, loaded_module
from optimize.compile.sources import Source, demo_folder, source_from_text
from optimize.errors import InputError
from optimize.quantize.data import feeds_from_file, feeds_of
from optimize.quantize.recording import feeds_from_call, sites_of_pipeline
from optimize.quantize.sets import read_set
from optimize.tools.cli import main

OUTPUTS: Mapping[str, Callable[[Any], torch.Tensor]] = {
    "text_encoder": lambda out: out[0],
    "vae_decoder": lambda out: out,
    "vae_encoder": lambda out: out,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(name: str) -> torch.nn.Module:
    """The tiny network of an architecture with its random weights, as the library made it."""
    component = next(iter(source_from_text(f"arch:{name}@tiny").components))
    module = loaded_module(component, "fp32")
    del module.__dict__["forward"]  # the adapter's
    return module


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(demo_folder() / "tokenizer")


def t5_tokenizer() -> Any:
    """Words as they stand, ended by 1 and padded with 0 like T5's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "cat", "on", "the", "moon", "red", "tractor"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=77
    )


@cache
def pipeline(name: str) -> Any:
    """A tiny pipeline of that kind, and the words of a run that is short and touches everything."""
    import diffusers

    parts = {part: network(key) for part, key in PIPELINES[name].items()}
    ddim = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=True)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = {
        "sd15": lambda: diffusers.StableDiffusionPipeline(**parts, tokenizer=clip, scheduler=ddim, **nothing),
        "sdxl-base": lambda: diffusers.StableDiffusionXLPipeline(
            **parts, tokenizer=clip, tokenizer_2=clip, scheduler=diffusers.EulerDiscreteScheduler()
        ),
        "sd35-medium": lambda: diffusers.StableDiffusion3Pipeline(
            **parts, tokenizer=clip, tokenizer_2=clip, tokenizer_3=t5, scheduler=flow
        ),
        "flux-dev": lambda: diffusers.FluxPipeline(**parts, tokenizer=clip, tokenizer_2=t5, scheduler=flow),
        "pixart-sigma": lambda: diffusers.PixArtSigmaPipeline(**parts, tokenizer=t5, scheduler=ddim),
    }[name]()
    made.set_progress_bar_config(disable=True)
    return made


RUN = {"prompt": "a cat on the moon", "num_inference_steps": 3, "height": 64, "width": 128, "output_type": "pt"}
MORE: Mapping[str, Mapping[str, Any]] = {"pixart-sigma": {"use_resolution_binning": False, "clean_caption": False}}


def run(name: str, seed: int = 0, **words: Any) -> Any:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        return pipeline(name)(**{**RUN, **MORE.get(name, {}), **words}, generator=generator).images


def outputs_of(pipe: Any) -> tuple[dict[str, list[torch.Tensor]], list[Any]]:
    """What each component's module gives while the hooks are there, and the hooks."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for site in sites_of_pipeline(pipe):
        part = {"vae_decoder": "decoder", "vae_encoder": "encoder"}.get(site.role, "")

        def keep(module: Any, args: Any, out: Any, name: str = site.name) -> None:
            found.setdefault(name, []).append((out if isinstance(out, torch.Tensor) else out[0]).clone())

        hooks.append(site.module.get_submodule(part).register_forward_hook(keep))
    return found, hooks


KINDS = ("sd15", "sdxl-base", "sd35-medium", "flux-dev", "pixart-sigma")


@pytest.mark.parametrize("name", KINDS)
def test_eager_on_what_was_recorded_gives_what_the_pipeline_gave(name: str, tmp_path: Path) -> None:
    pipe = pipeline(name)
    plain = run(name)
    theirs, hooks = outputs_of(pipe)
    with optimize.record(pipe, tmp_path) as recording:
        images = run(name)
    for hook in hooks:
        hook.remove()
    assert torch.equal(plain, images)  # nothing was touched
    assert recording.left_out == {}
    components = {c.name: c for c in source_from_text(f"arch:{name}@tiny").components}
    assert recording.sets.keys() == components.keys()
    for part, found in recording.sets.items():
        if part == "vae_encoder":
            continue  # text to image: what was decoded could be encoded; nobody did
        with EagerRunner(components[part]) as eager:
            ours = [next(iter(eager.infer(feeds).values())) for feeds in found]
        unlike = [t for i, t in enumerate(theirs[part]) if not any(torch.equal(t, u) for u in theirs[part][:i])]
        assert len(ours) == len(unlike) > 0, part
        for a, b in zip(ours, unlike, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
