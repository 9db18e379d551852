"""Pipelines whose networks are runners draw what the pipeline of diffusers draws by itself, to the last bit."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch

from optimize.compile.bundle import record_of
from optimize.compile.runners import EagerRunner, loaded_module
from optimize.compile.sources import demo_folder, source_from_text
from optimize.errors import InputError
from optimize.profiles.drawing import DRAWN, Drawing, drawing_of, images_of, why_not_drawn

CASES = {
    "sdxl-base": ("StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
    "sd35-medium": ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "flux-dev": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
    "pixart-sigma": ("PixArtSigmaPipeline", "DPMSolverMultistepScheduler"),
}


def tokenizer_for(module: Any) -> Any:
    """The demo's for CLIP; letters for T5."""
    import transformers

    if type(module).__name__ != "T5EncoderModel":
        return transformers.CLIPTokenizer.from_pretrained(demo_folder() / "tokenizer")
    letters = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -9.0),
        ("▁", -2.0),
        *((c, -3.0) for c in string.ascii_lowercase),
    ]
    return transformers.T5Tokenizer(vocab=letters, extra_ids=0)


def tiny_pipeline(name: str, folder: Path) -> Path:
    """A pipeline of `arch:NAME@tiny`'s networks as save_pretrained writes it."""
    import diffusers

    modules: dict[str, Any] = {}
    for component in source_from_text(f"arch:{name}@tiny").components:
        part = "vae" if component.role.startswith("vae") else component.name
        if part not in modules:
            modules[part] = loaded_module(component, "fp32")
            modules[part].__dict__.pop("forward")
    tokenizers = {
        part.replace("text_encoder", "tokenizer"): tokenizer_for(module)
        for part, module in modules.items()
        if part.startswith("text_encoder")
    }
    cls, scheduler = (getattr(diffusers, word) for word in CASES[name])
    cls(scheduler=scheduler(), **modules, **tokenizers).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_runners_in_the_networks_places_change_nothing(name: str, tmp_path: Path) -> None:
    """Three images in batches of two and one: hidden states, pooled texts, sizes and masks all arrive."""
    folder = tiny_pipeline(name, tmp_path / "pipeline")
    components = {c.name: c for c in source_from_text(str(folder)).components if c.role in DRAWN}
    assert why_not_drawn(folder, {n: record_of(c) for n, c in components.items()}) is None
    drawing = Drawing(("two birds", "one", "a house in the hills"), (3, 1, 2), 2, 5.0, 64, 96, batch=2)
    parts = {n: (c, EagerRunner(c)) for n, c in components.items()}
    ours = images_of(folder, parts, drawing, lambda _: None)
    theirs = images_of(folder, {}, drawing, lambda _: None)
    assert ours.shape == (3, 3, 64, 96) and float(theirs.std()) > 0.01
    assert torch.equal(ours, theirs)


def test_onnx_draws_what_eager_draws(demo_bundle: Path) -> None:
    """The demo through ONNX Runtime: 7 images, one at a time and in batches of 4 and 3."""
    import optimize
    from optimize.loading import component_of

    loaded = optimize.load(demo_bundle)
    names = ("text_encoder", "unet", "vae_decoder")
    prompts = tuple(f"a handwritten {word}" for word in ("one", "two", "zero", "nine", "one", "six", "two"))
    drawings = [Drawing(prompts, tuple(range(7)), 3, 3.0, 32, 32, batch) for batch in (4, 1)]
    drawn = []
    for drawing in drawings:
        parts = {n: (component_of(loaded.bundle, n), loaded[n].runner()) for n in names}
        drawn.append(images_of(demo_folder(), parts, drawing, lambda _: None))
    theirs = images_of(demo_folder(), {}, drawings[0], lambda _: None)
    assert drawn[0].shape == (7, 1, 32, 32) and 0 <= float(drawn[0].min()) < float(drawn[0].max()) <= 1
    for ours in drawn:
        assert float((ours - theirs).abs().max()) < 1e-4


def test_an_artifact_of_fewer_rows_is_called_several_times(demo_bundle: Path) -> None:
    """Guidance doubles the rows; a static batch of one takes them one by one. Other sizes are refused by name."""
    import optimize
    from optimize.compile.spec import Axis
    from optimize.loading import component_of

    loaded = optimize.load(demo_bundle)
    names = ("text_encoder", "unet", "vae_decoder")
    drawing, drawn = Drawing(("a handwritten seven",), (3,), 2, 3.0, 32, 32, 1), []
    for most in (8, 1):
        parts = {n: component_of(loaded.bundle, n).with_axes({"batch": Axis("batch", 1, 1, most)}) for n in names}
        runners = {n: (c, loaded[n].runner()) for n, c in parts.items()}
        drawn.append(images_of(demo_folder(), runners, drawing, lambda _: None))
    assert float((drawn[0] - drawn[1]).abs().max()) < 1e-4
    short = {
        "text_encoder": (
            parts["text_encoder"].with_axes({"tokens": Axis("tokens", 7, 7, 7)}),
            loaded["text_encoder"].runner(),
        )
    }
    with pytest.raises(InputError, match="tokens is"):
        images_of(demo_folder(), short, drawing, lambda _: None)


def test_stand_ins_hold_no_weights(tmp_path: Path) -> None:
    """A network that is replaced needs no file of weights."""
    folder = tiny_pipeline("flux-dev", tmp_path / "pipeline")
    source = source_from_text(str(folder))
    parts = {c.name: (c, EagerRunner(c)) for c in source.components if c.role in DRAWN}
    drawing = Drawing(("a",), (0,), 1, 1.0, 64, 64, batch=1)
    before = images_of(folder, {n: p for n, p in parts.items() if n != "transformer"}, drawing, lambda _: None)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "kept.safetensors")
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        images_of(folder, {}, drawing, lambda _: None)
    kept = loaded_in(tmp_path / "kept.safetensors", parts["transformer"][0])
    assert torch.equal(images_of(folder, {**parts, "transformer": kept}, drawing, lambda _: None), before)


def loaded_in(file: Path, component: Any) -> tuple[Any, EagerRunner]:
    from dataclasses import replace

    from optimize.compile.weights import SafetensorsWeights

    return component, EagerRunner(replace(component, weights=SafetensorsWeights([file])))


def test_what_is_drawn(demo_bundle: Path) -> None:
    import optimize

    records = optimize.load(demo_bundle).bundle.manifest.components
    drawing = drawing_of(records, 5, 2, ["a", "b"], 9, None)
    assert (drawing.prompts, drawing.seeds) == (("a", "b", "a", "b", "a"), (2000, 2001, 2002, 2003, 2004))
    assert (drawing.height, drawing.width, drawing.batch) == (32, 32, 4)  # of the denoiser's 8, halved by guidance


def test_why_nothing_is_drawn(demo_bundle: Path, tmp_path: Path) -> None:
    import json

    import optimize

    records = optimize.load(demo_bundle).bundle.manifest.components
    assert why_not_drawn(None, records) == "the source is no pipeline of diffusers"
    assert why_not_drawn(tmp_path, records) == "the source is no pipeline of diffusers"
    without = {n: r for n, r in records.items() if r.role != "unet"}
    assert why_not_drawn(demo_folder(), without) == "the bundle has no denoiser with a VAE's decoder"
    for name in ("DiTPipeline", "StableDiffusionImg2ImgPipeline"):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        assert why_not_drawn(tmp_path, records) == f"{name} draws not from a prompt alone"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    with pytest.raises(InputError, match="none of diffusers"):
        why_not_drawn(tmp_path, records)
