"""fp16 that cannot overflow: two models whose insides pass 65504 are refused as they are, and proved with the fewest
nodes in fp32. Each rule of `quantize/islands.py` on a graph of its own."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open

import optimize
from optimize.compile.bundle import Bundle
from optimize.compile.emulate import emulated
from optimize.compile.external import header_bytes, inline_small, point_at, write_weights
from optimize.compile.onnx_model import Clock, drop_unused_initializers, graph_from_component
from optimize.compile.runners import EagerRunner, OnnxRuntimeRunner
from optimize.compile.segments import run_segments, segments_of
from optimize.compile.sources import source_from_text
from optimize.errors import GateError, InputError
from optimize.quantize import islands
from optimize.quantize.islands import Kept, islands_of, matches, widen
from optimize.quantize.probe import LIMIT, Range, parity_feeds, probe_graph, weight_ranges
from optimize.tools.cli import main

WHOLE = 1 << 62
VAE_ISLANDS = {
    "decoder.mid_block.resnets.1.conv2/Conv",
    "decoder.mid_block.resnets.1/Add",
    "decoder.mid_block.resnets.1/Div",
    "decoder.up_blocks.0.resnets.0.norm1/GroupNormalization",
    "decoder.up_blocks.0.resnets.0/Add",
    "decoder.up_blocks.0.resnets.0/Div",
    "decoder.up_blocks.0.resnets.1.norm1/GroupNormalization",
    "decoder.up_blocks.0.resnets.1/Add",
    "decoder.up_blocks.0.resnets.1/Div",
    "decoder.up_blocks.0.upsamplers.0/Resize",
    "decoder.up_blocks.0.upsamplers.0.conv/Conv",
}
DIT_ISLANDS = {
    "transformer_blocks.1.ff.net.2/MatMul",
    "transformer_blocks.1.ff.net.2/Add",
    "transformer_blocks.1/Mul_2",
    "transformer_blocks.1/Add_3",
    "transformer_blocks.2.norm1.norm/LayerNormalization",
    "transformer_blocks.2/Add",
    "transformer_blocks.2.norm3/LayerNormalization",
    "transformer_blocks.2.ff.net.2/MatMul",
    "transformer_blocks.2.ff.net.2/Add",
    "transformer_blocks.2/Mul_2",
    "transformer_blocks.2/Add_3",
    "norm_out/LayerNormalization",
}
ISLANDS = {"vae_decoder": VAE_ISLANDS, "model": DIT_ISLANDS}


def vae(folder: Path) -> Path:
    """An AutoencoderKL whose decoder's mid block goes far above 65504, as SDXL's does; later norms bring it back."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    with torch.no_grad():
        model.decoder.mid_block.resnets[1].conv2.weight *= 3e5
        model.decoder.up_blocks[0].upsamplers[0].conv.weight *= 1e-3
    model.save_pretrained(folder)
    return folder


def dit(folder: Path) -> Path:
    """A DiT whose residual stream passes 65504 in the last two of its three blocks; the last norm brings it back."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        sample_size=16,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        num_embeds_ada_norm=10,
        in_channels=4,
        out_channels=8,
        norm_type="ada_norm_zero",
    ).eval()
    with torch.no_grad():
        for block in list(model.transformer_blocks)[-2:]:
            block.ff.net[2].weight *= 1.5e5
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"vae_decoder": vae(root / "vae"), "model": dit(root / "dit")}


@pytest.fixture(scope="module")
def bundles(folders, tmp_path_factory):
    """Each model's component as a user exports it."""
    root = tmp_path_factory.mktemp("bundles")
    return {
        name: optimize.export(str(folder), root / name, components=[name], precisions=["fp16"])
        for name, folder in folders.items()
    }


def component_of(folder, name):
    return next(c for c in source_from_text(str(folder)).components if c.name == name)


def saved(model, folder):
    folder.mkdir(exist_ok=True)
    write_weights(model, folder / "w.safetensors", {}, lambda *_: None)
    inline_small(model)
    point_at(model, "w.safetensors", header_bytes(folder / "w.safetensors"))
    ir.save(model, folder / "graph.onnx")
    return folder / "graph.onnx"


def graph_of(component, opset=23):
    model, _, _ = graph_from_component(component, "fp16", opset, Clock(lambda _: None))
    drop_unused_initializers(model)
    return model


def as_stored(path, feeds):
    """What the graph gives where every fp16 value is rounded to fp16."""
    model = ir.load(path)
    return run_segments(path, segments_of(model, WHOLE), [feeds], partial(emulated, precision="fp16"))[0]


def finite(outputs):
    return all(bool(t.isfinite().all()) for t in outputs.values())


# --- the two cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ISLANDS)
def test_plain_fp16_is_not_finite_and_is_refused_with_the_first_tensor(name, folders, tmp_path, capsys):
    component = component_of(folders[name], name)
    feeds = parity_feeds(component)[0]
    with EagerRunner(component, "fp16") as eager:
        assert not finite(eager.infer(feeds))
    assert not finite(as_stored(saved(graph_of(component), tmp_path / "plain"), feeds))
    words = ["export", str(folders[name]), "--component", name, "--precision", "fp16", "--no-probe"]
    assert main([*words, "--out", str(tmp_path / "b")]) == 1
    said = capsys.readouterr().err
    first = {"vae_decoder": "decoder.mid_block.resnets.1.conv2/Conv", "model": "transformer_blocks.1.ff.net.2/MatMul"}
    assert "--no-probe: nothing looks for what overflows" in said
    assert f"got: {first[name]} reaches " in said and "drop --no-probe" in said


@pytest.mark.parametrize("name", ISLANDS)
def test_with_islands_it_is_finite_and_proved(name, bundles, capsys):
    artifact = bundles[name].manifest.artifacts[f"{name}/fp16"]
    kept = artifact.spec["fp32"]
    assert artifact.downgrades == [f"{len(kept)} nodes stay in fp32; {kept[0]['node']}: {kept[0]['why']}"]
    assert main(["inspect", str(bundles[name].root), "--component", name]) == 0
    assert capsys.readouterr().out.count(" reaches ") == len(kept)
    assert {k["node"] for k in kept} == ISLANDS[name]
    assert all(k["figure"] > LIMIT and f"{k['figure']:.4g}" in k["why"] for k in kept)
    assert all(k["node"].startswith(k["module"]) for k in kept)
    parity = artifact.parity
    assert parity is not None and parity.passed and "fp16's 11 bits and fp32's range" in parity.rule
    assert all(o.finite and o.relative < 5e-3 and o.eager < 1e-2 for s in parity.shapes for o in s.outputs)
    assert any("every fp16 value rounded" in note for note in parity.notes)
    assert artifact.spec["probe"]["first_overflow"] in ISLANDS[name]
    assert [r.state for r in optimize.verify(bundles[name].root) if r.artifact == artifact.id] == ["passed"]


@pytest.mark.parametrize("name", ISLANDS)
def test_the_table_of_the_probe_lies_beside(name, bundles):
    table = json.loads(bundles[name].path(bundles[name].manifest.artifacts[f"{name}/fp16/probe"]).read_text())
    over = {n for n, r in table["ranges"].items() if r["largest"] > LIMIT}
    assert over and over < ISLANDS[name]
    assert all(0 < table["ranges"][n]["near"] <= 1 for n in over)


@pytest.mark.parametrize("name", ISLANDS)
def test_weights_of_islands_alone_are_fp32_and_no_others(name, bundles):
    with safe_open(bundles[name].root / name / f"{name}.fp16.safetensors", "pt") as file:
        wide = {key for key in file.keys() if file.get_tensor(key).dtype == torch.float32}  # noqa: SIM118
    modules = {"vae_decoder": ("mid_block.resnets.1.conv2", "upsamplers.0.conv"), "model": ("ff.net.2",)}[name]
    assert wide and all(any(module in key for module in modules) for key in wide)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("name", ISLANDS)
def test_every_island_is_needed(name, opset, folders, tmp_path):
    """Without any one of them the graph, as a GPU stores its values, is not finite; with all of them it is."""
    component = component_of(folders[name], name)
    model, feeds = graph_of(component, opset), parity_feeds(component)
    plain = saved(model.clone(), tmp_path / "plain")
    probe = probe_graph(plain, feeds, WHOLE, lambda _: None)
    kept = islands_of(model, "fp16", probe.ranges, (), weight_ranges(model, plain))
    assert opset == 18 or {k.node for k in kept} == ISLANDS[name]

    def outputs(some):
        changed = model.clone()
        widen(changed, "fp16", some, probe.ranges)
        path = saved(changed, tmp_path / "changed")
        onnx.checker.check_model(str(path), full_check=True)
        return as_stored(path, feeds[0])

    assert finite(outputs(kept))
    needed = kept if opset == 23 else kept[:1]
    assert not [k.node for k in needed if finite(outputs([other for other in kept if other is not k]))]


def test_an_island_left_out_is_refused(folders, tmp_path, monkeypatch):
    """ONNX Runtime's CPU provider would hide it: it computes much of fp16 in fp32."""
    honest = islands.islands_of
    lost = "norm_out/LayerNormalization"
    monkeypatch.setattr(islands, "islands_of", lambda *args: [k for k in honest(*args) if k.node != lost])
    with pytest.raises(GateError, match=r"parity missed: model fp16(.|\n)*not finite"):
        optimize.export(str(folders["model"]), tmp_path / "b", precisions=["fp16"])


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
@pytest.mark.parametrize("name", ISLANDS)
def test_an_engine_is_built_of_it(name, bundles):
    built = optimize.build(bundles[name].root, targets=["sm89"], components=[name])
    assert built.manifest.artifacts[f"{name}/fp16/sm89"].bytes > 1000


def test_the_demo_needs_none(demo_bundle):
    bundle = Bundle.read(demo_bundle)
    spec = bundle.manifest.artifacts["text_encoder/fp16"].spec
    assert "fp32" not in spec and spec["probe"]["near"] == 0
    assert spec["probe"]["how"].startswith("recorded from StableDiffusionPipeline")


# --- the user's words ------------------------------------------------------------------------------------------------


def exported(folder, out, **words):
    bundle = optimize.export(str(folder), out, components=["model"], **words)
    return bundle.manifest.artifacts


def test_keep_fp32_by_pattern_in_bf16_too(folders, tmp_path):
    artifacts = exported(folders["model"], tmp_path / "b", precisions=["bf16"], keep_fp32=["transformer_blocks.0"])
    artifact = artifacts["model/bf16"]
    kept = artifact.spec["fp32"]
    assert len(kept) > 20 and all(k["module"].startswith("transformer_blocks.0") for k in kept)
    assert {k["why"] for k in kept} == {"asked for: --keep-fp32 transformer_blocks.0"}
    assert artifact.notes == ["not probed: bf16 has the range of fp32"] and "probe" not in artifact.spec
    graph = ir.load(tmp_path / "b" / artifact.path).graph
    types = {str(n.name): n.outputs[0].dtype for n in graph if n.op_type == "LayerNormalization"}
    assert {d for n, d in types.items() if ".0." in n} == {ir.DataType.FLOAT}
    assert {d for n, d in types.items() if ".2." in n} == {ir.DataType.BFLOAT16}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--keep-fp32", "transformer_block.1"], r"no module matches transformer_block.1(.|\n)*transformer_blocks.1"),
        (["--keep-fp32", "mid*"], "no module matches mid"),
        (["--probe-steps", "0"], "the probe needs a step"),
        (["--probe-steps", "2", "--no-probe"], "asked for and forbidden"),
        (["--keep-fp32", "norm_out", "--precision", "fp32"], "--keep-fp32 is for fp16 and bf16"),
    ],
)
def test_words_that_cannot_be_meant(words, text, folders, tmp_path, capsys):
    precision = [] if "--precision" in words else ["--precision", "fp16"]
    assert main(["export", str(folders["model"]), "--out", str(tmp_path / "b"), *precision, *words]) == 2
    assert not (tmp_path / "b").exists()
    said = capsys.readouterr().err
    assert re.search(text, said), said


def test_a_node_that_a_module_lacks_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match=r"norm_out has no node norm_out/Softmax(.|\n)*norm_out/LayerNormalization"):
        exported(folders["model"], tmp_path / "b", precisions=["fp16"], keep_fp32=["norm_out/Softmax"])


def test_the_cache_knows_what_was_asked(folders, bundles):
    plan = partial(optimize.export, str(folders["model"]), bundles["model"].root, precisions=["fp16"], dry_run=True)
    assert plan().steps[0].why == "unchanged"
    assert plan(probe_steps=2).steps[0].why == "changed: probe"
    assert plan(no_probe=True).steps[0].why == "changed: probe"
    assert plan(keep_fp32=["norm_out"]).steps[0].why == "changed: keep fp32"


def test_patterns():
    assert matches("a.b", "a.b.c/Conv", "a.b.c") and matches("a.*", "a.b/Conv", "a.b")
    assert matches("*/Conv", "a.b/Conv", "a.b") and matches("a.b/Conv", "a.b/Conv", "a.b")
    assert not matches("a", "ab/Conv", "ab") and not matches("b", "a.b/Conv", "a.b")


# --- the rules -------------------------------------------------------------------------------------------------------


def parsed(text):
    return ir.serde.deserialize_model(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> g {text}'))


def named(text):
    """A graph whose nodes are called `path/Operator` after their output."""
    model = parsed(text)
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    onnx_model = onnx.shape_inference.infer_shapes(ir.serde.serialize_model(model))
    return ir.serde.deserialize_model(onnx_model)


def large(**magnitudes):
    return {name: Range(float(m), float(m)) for name, m in magnitudes.items()}


def kept_names(model, ranges):
    return [k.node for k in islands_of(model, "fp16", ranges, (), {})]


CHAIN = (
    "(float16[n,4,8,8] x, float16[4,4,1,1] w) => (float16[n,4,8,8] y)"
    "{ a = Conv(x, w) b = Sigmoid(a) c = Mul(a, b) d = Conv(c, w) y = Tanh(d) }"
)


def test_cheap_nodes_between_two_islands_join_where_that_saves_casts():
    both = large(x=1, a=1e5, b=1, c=1, d=1e5, y=1)
    assert kept_names(named(CHAIN), both) == ["a", "b", "c", "d", "y"]
    assert kept_names(named(CHAIN), large(x=1, a=1e5, b=1, c=1, d=1, y=1)) == ["a", "b", "c"]
    model = named(CHAIN)
    widen(model, "fp16", islands_of(model, "fp16", both, (), {}), both)
    assert sorted(str(n.name) for n in model.graph if n.op_type == "Cast") == ["w/widened", "x/widened", "y/narrowed"]


def test_an_output_that_fp16_cannot_hold_is_fp32():
    model, ranges = named(CHAIN), large(x=1, a=1, b=1, c=1, d=1, y=1e5)
    widen(model, "fp16", islands_of(model, "fp16", ranges, (), {}), ranges)
    assert [(str(v.name), v.dtype) for v in model.graph.outputs] == [("y", ir.DataType.FLOAT)]


MASKED = (
    "(float16[n,7,8] q, float16[n,8,7] k, float16[n,7,7] m, bool[7,7] open) => (float16[n,7,7] y)"
    "<float16 low = {-65504}>"
    "{ s = MatMul(q, k) t = Where(open, s, low) y = Softmax(t) }"
)


def test_a_mask_is_no_overflow_and_hides_none():
    assert kept_names(named(MASKED), large(q=9, k=9, s=640, t=65504, y=1)) == []
    assert kept_names(named(MASKED), large(q=300, k=300, s=9e4, t=9e4, y=1)) == ["s", "t", "y"]


def test_what_depends_on_no_data_may_go_to_the_end_of_fp16():
    text = (
        "(bool[n,7] open, float16[n,7] x) => (float16[n,7] y)<float16 low = {-65504}, float16 zero = {0}>"
        "{ m = Where(open, zero, low) y = Max(x, m) }"
    )
    assert kept_names(named(text), large(m=65504, y=1)) == []
    assert kept_names(named(text), large(m=65504, y=40000)) == ["y"]


def test_limits_of_a_clamp_may_go_to_the_end_of_fp16():
    """T5 clamps to 65504, or 64504 where something is infinite: which of the two depends on data, but no more."""
    text = (
        "(bool[1] some, float16[n,7] x) => (float16[n,7] y)<float16 low = {64504}, float16 high = {65504}>"
        "{ m = Where(some, low, high) y = Min(x, m) }"
    )
    assert kept_names(named(text), large(m=65504, y=9)) == []


def test_attention_whose_hidden_scores_pass_the_limit_is_fp32(tmp_path):
    """q and k are far from the limit, their products are not. The figure is the largest score itself, not a bound."""
    inputs = ", ".join(f"float16[n,2,t,16] {n}" for n in "qkv")
    text = f"({inputs}) => (float16[n,2,t,16] y) {{ y = Attention<scale=0.5>(q, k, v) }}"
    rng = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(1, 2, 7, 16, generator=rng) for n in "qkv"}
    for factor in (50, 300):
        feeds = {n: (t * (1 if n == "v" else factor)).half() for n, t in drawn.items()}
        largest = (feeds["q"].float() @ feeds["k"].float().mT).abs().max().item() / 2
        model = named(text)
        ir.save(model, tmp_path / "g.onnx")
        probe = probe_graph(tmp_path / "g.onnx", [feeds], WHOLE, lambda _: None)
        kept = islands_of(model, "fp16", probe.ranges, (), {})
        assert [k.node for k in kept] == (["y"] if largest > LIMIT else [])
    assert kept[0].figure == pytest.approx(largest, rel=1e-3) and "its scores reach" in kept[0].why
    widen(model, "fp16", kept, probe.ranges)
    ir.save(model, tmp_path / "w.onnx")
    with OnnxRuntimeRunner(tmp_path / "w.onnx") as wide, OnnxRuntimeRunner(tmp_path / "g.onnx") as plain:
        assert finite(wide.infer(feeds)) and not finite(plain.infer(feeds))


def test_weights_that_fp16_cannot_hold(tmp_path):
    """One above its range and one far below it: both stay in fp32, and the graph agrees with eager fp32."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down, self.plain = (torch.nn.Linear(63, 63) for _ in range(3))
            self.up.weight.data[0, 0], self.down.weight.data = torch.tensor(1e5), self.down.weight.data * 1e-6

        def forward(self, x):
            return self.plain(torch.tanh(self.down(self.up(x))))

    specs = [optimize.TensorSpec("x", ("n", 63))]
    component = optimize.Component.from_module(Net(), specs, ["y"], [optimize.Axis("n", 1, 7, 77)])
    model = graph_of(component)
    weights = weight_ranges(model, saved(model.clone(), tmp_path))
    assert set(weights) == {"up.weight", "down.weight"} and weights["up.weight"].largest == 1e5
    kept = islands_of(model, "fp16", {}, (), weights)
    assert [k.module for k in kept] == ["up", "down"]
    assert [k.why.partition(", which ")[2][:8] for k in kept] == ["reaches ", "is about"]
    widen(model, "fp16", kept, {})
    types = {n: v.dtype for n, v in model.graph.initializers.items() if n.endswith("weight")}
    assert types == {"up.weight": 1, "down.weight": 1, "plain.weight": 10}


SMALL = (
    "(float16[n,63] x, float16[63] w, float16[63,63] m) => (float16[n,63] y)"
    "{ a = Mul(x, w) b = Reshape(a, s) c = Add(b, x) d = MatMul(b, m) y = Add(c, d) }"
)


def test_small_numbers_stay_in_fp32_only_where_their_loss_shows():
    """`a` and `b` are lost in fp16. Added to larger numbers they are not missed; multiplied up to such they are."""
    text = SMALL.replace("=> (float16[n,63] y)", "=> (float16[n,63] y)<int64[2] s = {-1, 63}>")
    unseen = large(x=1, a=1e-7, b=1e-7, c=1, d=1e-7, y=1)
    assert kept_names(named(text), unseen) == []
    assert kept_names(named(text), {**unseen, **large(d=1)}) == ["a", "b", "d"]


def test_a_pattern_on_nothing_changes_nothing():
    model = named(CHAIN)
    before = ir.serde.serialize_model(model).SerializeToString()
    widen(model, "fp16", [], {})
    assert ir.serde.serialize_model(model).SerializeToString() == before


def test_a_record_is_plain_data():
    kept = Kept("a/Conv", "a", "its output reaches 7e+04", 7e4)
    assert kept.record() == {"node": "a/Conv", "module": "a", "why": "its output reaches 7e+04", "figure": 7e4}
