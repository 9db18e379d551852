"""Recording a running pipeline: tiny pipelines of the classes that diffusers has, put together from `arch:` networks.

What is recorded has to be what the module was given: the component's eager forward on recorded feeds must give what the
pipeline's own module gave.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import optimize
from optimize.compile.architectures import ARCHITECTURES, PIPELINES
from optimize.compile.runners import EagerRunner, loaded_module
from optimize.compile.sources import demo_folder, source_from_text
from optimize.errors import InputError
from optimize.quantize.data import feeds_from_file, feeds_of
from optimize.quantize.recording import feeds_from_call, sites_of_pipeline
from optimize.quantize.sets import read_set
from optimize.tools.cli import main


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


def test_every_second_call_of_chosen_components(tmp_path: Path) -> None:
    pipe = pipeline("sd15")
    with optimize.record(pipe, tmp_path / "f", components=["unet", "vae_decoder"], every=2) as recording:
        run("sd15", num_inference_steps=5)
        run("sd15", seed=1, num_inference_steps=5)
    assert recording.sets.keys() == {"unet", "vae_decoder"}
    assert [n["call"] for n in recording.sets["unet"].notes] == [0, 2, 4, 6, 8]
    assert len(recording.sets["vae_decoder"]) == 1
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["unet", "vae_decoder"]


def hooks_of(pipe: Any) -> int:
    modules = (m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules())
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)


def test_an_error_leaves_no_set_and_no_hooks(tmp_path: Path) -> None:
    pipe = pipeline("sd15")
    before = hooks_of(pipe)
    with pytest.raises(KeyError), optimize.record(pipe, tmp_path, components=["unet"]):
        assert hooks_of(pipe) > before
        run("sd15")
        raise KeyError
    assert hooks_of(pipe) == before
    with pytest.raises(InputError, match="was interrupted"):
        read_set(tmp_path / "unet")
    with optimize.record(pipe, tmp_path, components=["unet"]) as recording:  # the same folder can be used again
        run("sd15", seed=3)
    assert len(recording.sets["unet"]) == 3 == len(read_set(tmp_path / "unet", "unet"))


def test_finished_sets_are_not_replaced_unasked(tmp_path: Path) -> None:
    pipe = pipeline("sd15")
    with optimize.record(pipe, tmp_path, components=["unet"]):
        run("sd15")
    with pytest.raises(InputError, match="has a finished calibration set"):
        optimize.record(pipe, tmp_path)


def test_what_was_never_called_is_said(tmp_path: Path) -> None:
    pipe = pipeline("sd15")
    with optimize.record(pipe, tmp_path / "a") as recording:
        run("sd15", output_type="latent")
    assert recording.left_out == dict.fromkeys(("vae_encoder", "vae_decoder"), "it was never called")
    assert not (tmp_path / "a" / "vae_decoder").exists()
    with (
        pytest.raises(InputError, match="nothing was recorded of vae_decoder"),
        optimize.record(pipe, tmp_path / "b", components=["vae_decoder"]),
    ):
        run("sd15", output_type="latent")


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    pipe = pipeline("sd15")
    with pytest.raises(InputError, match="has no component unett") as raised:
        optimize.record(pipe, tmp_path, components=["unett"])
    assert all(name in str(raised.value) for name in ("unet", "vae_encoder", "vae_decoder", "text_encoder"))
    with pytest.raises(InputError, match="every how many"):
        optimize.record(pipe, tmp_path, every=0)
    with pytest.raises(InputError, match="no diffusers pipeline"):
        optimize.record(torch.nn.Linear(1, 1), tmp_path)


def test_larger_batches_than_the_components_are_split(tmp_path: Path) -> None:
    """Guidance over five prompts is a batch of ten; the component takes eight, the VAE four."""
    pipe = pipeline("sd15")
    with optimize.record(pipe, tmp_path) as recording:
        run("sd15", prompt=["a", "b", "c", "d", "e"], num_inference_steps=1)
    assert [n["rows"] for n in recording.sets["unet"].notes] == ["0:8", "8:10"]
    assert [n["rows"] for n in recording.sets["vae_decoder"].notes] == ["0:4", "4:5"]
    assert [f["sample"].shape[0] for f in recording.sets["unet"]] == [8, 2]


def test_images_that_are_encoded_are_recorded(tmp_path: Path) -> None:
    """Image to image: the encoder's input is the picture, and eager on it gives the encoder's own output."""
    import diffusers

    base = pipeline("sd15")
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    given: list[torch.Tensor] = []
    hook = pipe.vae.encoder.register_forward_hook(lambda module, args, out: given.append(out.clone()))
    with optimize.record(pipe, tmp_path, components=["vae_encoder"]) as recording, torch.no_grad():
        pipe("a cat", picture, num_inference_steps=2, strength=1.0, output_type="pt")
    hook.remove()
    encoded, decoded = recording.sets["vae_encoder"]
    torch.testing.assert_close(encoded["sample"], picture * 2 - 1)
    assert decoded["sample"].abs().max() <= 1
    torch.testing.assert_close(pipe.vae.encoder(encoded["sample"]), given[0])


def test_a_network_steered_by_a_controlnet_is_left_out_and_the_controlnet_recorded(tmp_path: Path) -> None:
    """The U-Net component has no place for what the ControlNet adds: to record it without would be another model's."""
    import diffusers

    base = pipeline("sd15")
    parts = {k: v for k, v in base.components.items() if k != "image_encoder"}
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=network("controlnet-sd15"), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    given: list[torch.Tensor] = []
    hook = pipe.controlnet.register_forward_hook(lambda module, args, out: given.append(out[1].clone()))
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with optimize.record(pipe, tmp_path) as recording, torch.no_grad():
        pipe("a cat", picture, num_inference_steps=2, output_type="latent")
    hook.remove()
    assert "down_block_additional_residuals" in recording.left_out["unet"] and "unet" not in recording.sets
    component = next(iter(source_from_text("arch:controlnet-sd15@tiny").components))
    with EagerRunner(component) as eager:
        for feeds, theirs in zip(recording.sets["controlnet"], given, strict=True):
            torch.testing.assert_close(eager.infer(feeds)["mid_block_res_sample"], theirs, rtol=1e-5, atol=1e-5)


def dit() -> torch.nn.Module:
    """With as many classes as its pipeline takes it to have: label 1000 means none."""
    import diffusers

    torch.manual_seed(0)
    config = ARCHITECTURES["dit-xl-2-256"].values(tiny=True)
    return diffusers.DiTTransformer2DModel(**{**config, "num_embeds_ada_norm": 1000})


@pytest.mark.parametrize("kind", ["dit", "ddpm"])
def test_pipelines_without_a_prompt(kind: str, tmp_path: Path) -> None:
    import diffusers

    ddim = diffusers.DDIMScheduler()
    made = {
        "dit": lambda: diffusers.DiTPipeline(dit(), network("vae-sd15"), ddim),
        "ddpm": lambda: diffusers.DDPMPipeline(network("ddpm-cifar10"), ddim),
    }[kind]()
    made.save_pretrained(tmp_path / "pipe")
    source = source_from_text(str(tmp_path / "pipe"))
    component = source.components[0]
    found = feeds_of(component, source, tmp_path / "feeds", samples=5)
    assert len(found) == 5 and found.how.startswith(f"recorded from {type(made).__name__}, 5 samples, 2 runs")
    assert len(feeds_from_file(component, tmp_path / "feeds")) == 5


def test_numbers_for_all_rows_and_masks_left_out_become_the_components() -> None:
    """As pipelines call: one timestep for the batch, FLUX's ids with a batch of one, T5 without a mask."""
    flux = next(c for c in source_from_text("arch:flux-dev@tiny").components if c.name == "transformer")
    sizes = {"batch": 3, "image_tokens": 63, "tokens": 7}
    values = {t.name: torch.ones(t.sizes(sizes)) for t in flux.inputs}
    values |= {"img_ids": values["img_ids"][None], "timestep": torch.tensor(0.5), "guidance": 3, "return_dict": False}
    feeds = feeds_from_call(flux.inputs, {**values, "joint_attention_kwargs": {}, "controlnet_block_samples": None})
    assert {n: tuple(t.shape) for n, t in feeds.items()} == {t.name: t.sizes(sizes) for t in flux.inputs}
    assert feeds["timestep"].tolist() == [0.5] * 3 and feeds["guidance"].tolist() == [3] * 3
    t5 = source_from_text("arch:t5-xxl@tiny").components[0]
    feeds = feeds_from_call(t5.inputs, {"input_ids": torch.zeros(2, 7, dtype=torch.int32), "attention_mask": None})
    assert feeds["attention_mask"].tolist() == [[1] * 7] * 2 and feeds["input_ids"].dtype == torch.int64
    clip = source_from_text("arch:clip-l@tiny").components[0]
    ids = torch.zeros(1, 7, dtype=torch.int64)
    assert feeds_from_call(clip.inputs, {"input_ids": ids, "attention_mask": torch.ones(1, 7)}).keys() == {"input_ids"}
    with pytest.raises(InputError, match="more than the component takes"):
        feeds_from_call(clip.inputs, {"input_ids": ids, "attention_mask": torch.zeros(1, 7)})
    with pytest.raises(InputError, match="without one of the component's inputs"):
        feeds_from_call(flux.inputs, {"hidden_states": values["hidden_states"]})


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_records_the_demo_for_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a handwritten three\n\n  a handwritten four \n")
    words = ["record", "demo", "--out", str(tmp_path / "d"), "--prompts", str(prompts), "--samples", "3", "--json"]
    assert main([*words, "--prompt", "a handwritten one", "--seed", "7"]) == 0
    rows = json.loads(capsys.readouterr().out)
    source = source_from_text("demo")
    assert [r["component"] for r in rows] == [c.name for c in source.components]
    for component in source.components:
        found = feeds_from_file(component, tmp_path / "d")
        assert len(found) == 3 and found.seed == 7 and found.component == component.name
        said = [n["prompt"] for n in found.notes]
        assert set(said) <= {"a handwritten one", "a handwritten three", "a handwritten four"}
        assert component.role == "text_encoder" or len(set(said)) == 3
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "d").rglob("*.safetensors")}
    assert main([*words, "--prompt", "a handwritten one", "--seed", "7"]) == 0  # found again
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "d").rglob("*.safetensors")}


def test_the_command_records_a_saved_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline("pixart-sigma").save_pretrained(tmp_path / "pipe")
    words = ["record", str(tmp_path / "pipe"), "--out", str(tmp_path / "d"), "--component", "transformer"]
    assert main([*words, "--samples", "4", "--axis", "height=64", "--axis", "width=128", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["samples"] == 4 and "PixArtSigmaPipeline" in row["how"]
    assert {tuple(f["hidden_states"].shape) for f in read_set(tmp_path / "d" / "transformer")} == {(2, 4, 8, 16)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["arch:sd15@tiny"], "has no pipeline to run"),
        (["demo", "--component", "nope"], "unknown component nope"),
        (["demo", "--samples", "0"], "no samples were asked for"),
        (["demo", "--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["demo", "--component", "unet", "--axis", "tokens=7", "--samples", "2"], "nothing was recorded of unet"),
    ],
)
def test_the_command_refuses(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", *words, "--out", str(tmp_path / "d")]) == 2
    assert said in capsys.readouterr().err


def test_a_file_without_prompts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p").write_text(" \n\n")
    assert main(["record", "demo", "--out", str(tmp_path / "d"), "--prompts", str(tmp_path / "p")]) == 2
    assert "has no prompts" in capsys.readouterr().err


def test_a_finished_set_of_another_making_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["record", "demo", "--component", "text_encoder", "--out", str(tmp_path / "r")]
    assert main([*words, "--samples", "3"]) == 0
    before = read_set(tmp_path / "r" / "text_encoder").digest()
    assert main([*words, "--samples", "3"]) == 0, "the same is found again"
    assert main([*words, "--samples", "2"]) == 2
    assert "has a finished calibration set" in capsys.readouterr().err
    assert read_set(tmp_path / "r" / "text_encoder").digest() == before
    file = tmp_path / "file"
    file.write_text("")
    assert main([*words[:-1], str(file)]) == 2
