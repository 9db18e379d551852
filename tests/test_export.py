"""Export end to end on the demo: what is written, that it goes on where it was, shares weights, loads and runs."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors import safe_open

import optimize
from optimize.compile.bundle import Bundle
from optimize.compile.feeds import feeds_for
from optimize.compile.spec import TensorSpec
from optimize.errors import InputError
from optimize.tools.cli import main


def specs(record: object) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t.name, tuple(t.shape), t.dtype, t.fill) for t in record.inputs)  # type: ignore[attr-defined]


def test_every_component_is_proved_at_three_sets_of_sizes(demo_bundle: Path) -> None:
    bundle = Bundle.read(demo_bundle)
    assert set(bundle.manifest.components) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    for artifact in bundle.artifacts(kind="onnx"):
        assert artifact.parity is not None and artifact.parity.passed
        traced, untraced = (
            next(s.sizes for s in artifact.parity.shapes if s.name == n) for n in ("traced", "untraced")
        )
        assert traced != untraced
        assert all(o.finite for s in artifact.parity.shapes for o in s.outputs)


def test_runs_at_a_size_that_no_gate_saw_and_agrees_with_eager(demo_bundle: Path) -> None:
    loaded = optimize.load(demo_bundle)
    sizes = {"batch": 5, "height": 56, "width": 24, "tokens": 63}
    feeds = feeds_for(specs(loaded["unet"].record), sizes, "fp32", seed=7)
    with loaded["unet"].runner("onnxruntime") as ours, loaded["unet"].runner("eager") as eager:
        got, expected = ours.infer(feeds)["out_sample"], eager.infer(feeds)["out_sample"]
    assert got.shape == (5, 4, 14, 6)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_graphs_are_what_the_standard_and_safetensors_take(demo_bundle: Path) -> None:
    graph = demo_bundle / "unet" / "unet.fp32.onnx"
    onnx.checker.check_model(str(graph), full_check=True)
    model = onnx.load(str(graph), load_external_data=False)
    assert model.opset_import[0].version == 23
    assert [i.name for i in model.graph.input] == ["sample", "timestep", "encoder_hidden_states"]
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 4, "height/4", "width/4"]
    operators = {n.op_type for n in model.graph.node}
    assert {"Attention", "GroupNormalization", "LayerNormalization", "Conv"} <= operators
    assert any(n.name.startswith("down_blocks.0.resnets.0.conv1/Conv") for n in model.graph.node)
    names = [n.name for n in model.graph.node]
    assert len(names) == len(set(names))
    locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    assert locations == {"unet.fp32.safetensors"}


def test_the_weights_file_holds_the_sources_numbers(demo_bundle: Path) -> None:
    source = Path(optimize.__file__).parent / "demo" / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(source, "pt") as a, safe_open(demo_bundle / "unet" / "unet.fp32.safetensors", "pt") as b:
        assert len(set(b.keys())) == len(list(b.keys()))
        for key in b.keys():  # noqa: SIM118 - safe_open is no mapping
            plain = key.removesuffix(".T")
            expected = a.get_tensor(plain)
            assert torch.equal(b.get_tensor(key), expected.T if key.endswith(".T") else expected)


def test_external_data_is_read_in_place_by_onnx_safetensors(demo_bundle: Path) -> None:
    import onnx_ir as ir

    model = ir.load(demo_bundle / "text_encoder" / "text_encoder.fp32.onnx")
    value = next(
        v for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.nbytes > 1024
    )
    with safe_open(demo_bundle / "text_encoder" / "text_encoder.fp32.safetensors", "np") as file:
        stored = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    assert value.const_value is not None
    array = value.const_value.numpy()
    assert any(np.array_equal(array, s) for s in stored.values())


def test_a_second_export_makes_nothing_again(demo_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(demo_bundle, root)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.*") if p.suffix in (".onnx", ".safetensors")}
    plan = optimize.export("demo", root, dry_run=True)
    assert [s.why for s in plan.steps] == ["unchanged"] * 4
    optimize.export("demo", root)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*.*") if p.suffix in (".onnx", ".safetensors")}


def test_a_lost_file_and_a_changed_axis_are_named_and_mended(demo_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(demo_bundle, root)
    (root / "vae_decoder" / "vae_decoder.fp32.safetensors").unlink()
    plan = optimize.export("demo", root, dry_run=True, components=["vae_decoder", "text_encoder"], axes=["tokens=16"])
    why = {s.artifact: s.why for s in plan.steps}
    assert why["vae_decoder/fp32"].startswith("file missing or changed: vae_decoder/fp32/weights")
    assert why["text_encoder/fp32"] == "changed: axes"
    optimize.export("demo", root, components=["vae_decoder"])
    assert all(v.state == "passed" for v in optimize.verify(root, components=["vae_decoder"]))


def test_graphs_of_one_precision_share_their_weights(tmp_path: Path) -> None:
    for opset in (23, 18):
        optimize.export("demo", tmp_path / "b", components=["vae_decoder"], opset=opset)
    bundle = Bundle.read(tmp_path / "b")
    assert len(bundle.artifacts(kind="onnx")) == 2 and len(bundle.artifacts(kind="weights")) == 1
    assert len(list((tmp_path / "b").rglob("*.safetensors"))) == 1
    assert all(v.state == "passed" for v in optimize.verify(tmp_path / "b"))


def test_a_static_axis_makes_a_static_graph(tmp_path: Path) -> None:
    optimize.export("demo", tmp_path / "b", components=["vae_decoder"], axes=["height=32", "width=32", "batch=1"])
    session = ort.InferenceSession(
        tmp_path / "b" / "vae_decoder" / "vae_decoder.fp32.onnx", providers=["CPUExecutionProvider"]
    )
    assert session.get_inputs()[0].shape == [1, 4, 8, 8]
    assert session.get_outputs()[0].shape == [1, 1, 32, 32]


def test_dry_run_writes_nothing_and_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "demo", "--out", str(tmp_path / "b"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [row["artifact"] for row in plan["rows"]] == [
        "text_encoder/fp32",
        "unet/fp32",
        "vae_encoder/fp32",
        "vae_decoder/fp32",
    ]
    assert plan["steps"][0] == "trace on meta tensors"
    assert not (tmp_path / "b").exists()


def test_the_view_has_shapes_and_no_numbers(demo_bundle: Path) -> None:
    view = onnx.load(str(demo_bundle / "unet" / "unet.fp32.view.onnx"), load_external_data=False)
    graph = onnx.load(str(demo_bundle / "unet" / "unet.fp32.onnx"), load_external_data=False)
    assert [n.name for n in view.graph.node] == [n.name for n in graph.graph.node]
    big = [t for t in view.graph.initializer if np.prod(t.dims) * 4 >= 1024]
    assert big and all(not t.raw_data and not t.external_data and t.dims for t in big)


def test_runner_words_are_checked(demo_bundle: Path) -> None:
    loaded = optimize.load(demo_bundle)
    with pytest.raises(InputError, match="unknown backend tensorflow"):
        loaded["unet"].runner("tensorflow")
    with pytest.raises(InputError, match="no component nothing"):
        loaded["nothing"]
    with pytest.raises(InputError, match="no ONNX artifact in bf16"):
        loaded["unet"].runner("onnxruntime", "bf16")
    with loaded["vae_decoder"].runner() as runner, pytest.raises(InputError, match="feeds do not fit"):
        runner.infer({"wrong": torch.zeros(1)})


def test_proved_in_segments_where_memory_is_short(tmp_path: Path) -> None:
    """With a small --memory the same artifact is run in pieces and eager module by module, to the same figures."""
    optimize.export("demo", tmp_path / "whole", components=["text_encoder"])
    optimize.export("demo", tmp_path / "parts", components=["text_encoder"], memory=1 << 20)
    parities = [Bundle.read(tmp_path / n).manifest.artifacts["text_encoder/fp32"].parity for n in ("whole", "parts")]
    assert parities[0] is not None and parities[1] is not None
    assert parities[0].passed and parities[1].passed
    assert parities[0].how == "whole" and parities[0].worst == pytest.approx(parities[1].worst, rel=0.5)


class Step(torch.nn.Module):
    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.linear, self.slope = torch.nn.Linear(7, 7), slope
        self.register_buffer("late", torch.ones(7), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.leaky_relu(self.linear(x), self.slope) * self.late


class Other(Step):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.linear(x)) * self.late


def test_a_module_that_computes_something_else_is_another_one() -> None:
    """The same weights: only code, attributes, buffers that are not saved, or names differ."""
    from optimize.exporting import key_of_source

    def key(module: torch.nn.Module, output: str = "y", fill: str = "normal") -> str:
        module.load_state_dict(state)
        inputs = [optimize.TensorSpec("x", ("batch", 7), fill=fill)]
        component = optimize.Component.from_module(module, inputs, [output], [optimize.Axis("batch", 1, 1, 7)])
        return json.dumps(key_of_source(component, "fp32"))

    state, moved = Step().state_dict(), Step()
    moved.late += 1
    keys = [key(Step()), key(Other()), key(Step(0.2)), key(moved), key(Step(), "z"), key(Step(), fill="zeros")]
    assert len(set(keys)) == len(keys) and key(Step()) == keys[0]


def test_a_source_that_is_no_text_is_refused_and_a_path_is_taken(tmp_path: Path) -> None:
    component = optimize.Component.from_module(torch.nn.Linear(7, 7), [optimize.TensorSpec("x", (1, 7))], ["y"])
    for wrong in (component, torch.nn.Linear(7, 7), None):
        with pytest.raises(InputError, match=r"the source is no text[\s\S]*python:MODULE:FUNCTION"):
            optimize.export(wrong, tmp_path / "b")
    for missing in (tmp_path / "nosuch", Path("demo")):  # a path is never the name of something built in
        with pytest.raises(InputError, match=rf"unknown source {re.escape(str(missing.resolve()))}"):
            optimize.export(missing, tmp_path / "b")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (optimize.TensorSpec("x", ("batch", 7), fill="id:100"), "input x has no such fill"),
        (optimize.TensorSpec("x", ("batch", 7), "int46"), "input x has no such type"),
        (optimize.TensorSpec("x", ("rows", 7)), "axis that is not declared"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(spec: optimize.TensorSpec, said: str) -> None:
    with pytest.raises(InputError, match=said):
        optimize.Component.from_module(Step(), [spec], ["y"], [optimize.Axis("batch", 1, 1, 7)])


FACTORY = """
import optimize, torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(63, 7)

    def forward(self, image, mask, ids):
        x = image.float() / 255
        return {"y": torch.where(mask, x, -1e9).softmax(-1), "rest": [x * mask, self.table(ids)]}

def net(fill="ids:63"):
    torch.manual_seed(0)
    inputs = [
        optimize.TensorSpec("image", ("batch", "n"), "uint8", "ids:255"),
        optimize.TensorSpec("mask", ("batch", "n"), "bool"),
        optimize.TensorSpec("ids", ("batch", "n"), "int64", fill),
    ]
    axes = [optimize.Axis("batch", 1, 2, 7), optimize.Axis("n", 1, 7, 77)]
    return optimize.Component.from_module(Net().eval(), inputs, ["y", "open", "rows"], axes, name="net")

def lost():
    return net("normal")
"""


def test_bytes_masks_and_outputs_in_a_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input in uint8, a mask that is not all open, outputs in a dict and a list."""
    (tmp_path / "my_net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for precision in ("fp32", "fp16"):
        optimize.export("python:my_net:net", tmp_path / "b", precisions=[precision])
    assert {v.state for v in optimize.verify(tmp_path / "b", trust_remote_code=True)} == {"passed"}
    with pytest.raises(InputError, match="fails on sample feeds"):
        optimize.export("python:my_net:lost", tmp_path / "c")


def test_masks_are_not_all_open() -> None:
    from optimize.compile.feeds import feeds_for

    mask = feeds_for((optimize.TensorSpec("m", (63, 77), "bool"),), {}, "fp32")["m"]
    assert mask[:, 0].all() and 0.3 < mask.float().mean() < 0.7


def test_an_artifact_is_verified_with_its_own_axes(tmp_path: Path) -> None:
    """A later export of another precision has others: the first one's graph is static."""
    words = {"components": ["text_encoder"]}
    optimize.export("demo", tmp_path / "b", axes=["tokens=7", "batch=1"], **words)
    optimize.export("demo", tmp_path / "b", precisions=["fp16"], **words)
    assert {v.state for v in optimize.verify(tmp_path / "b")} == {"passed"}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="skipped: needs tensorrt-rtx")
def test_an_engine_has_its_graphs_axes(tmp_path: Path) -> None:
    words = {"components": ["text_encoder"]}
    optimize.export("demo", tmp_path / "b", axes=["tokens=1:7:16"], **words)
    optimize.export("demo", tmp_path / "b", precisions=["fp16"], axes=["tokens=1:2:3"], **words)
    optimize.build(tmp_path / "b", targets=["sm89"], precisions=["fp32"])
    (engine,) = (a for a in optimize.Bundle.read(tmp_path / "b").manifest.artifacts.values() if a.kind == "engine")
    assert engine.spec["profile"] == {"input_ids": [[1, 1], [1, 7], [8, 16]]}
