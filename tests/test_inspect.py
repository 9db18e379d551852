"""`optimize inspect` against counts made with plain onnx, against the manifest, and with weights that are missing."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest

import optimize
from optimize.errors import InputError
from optimize.tools import cli, inspecting
from optimize.tools.inspecting import Inspection, inspect

FLOATS = {onnx.TensorProto.FLOAT: ("float32", 4), onnx.TensorProto.FLOAT16: ("float16", 2)}
NAMES = {
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.BOOL: "bool",
    onnx.TensorProto.INT32: "int32",
    **{code: name for code, (name, _) in FLOATS.items()},
}
ALL = ["text_encoder/fp32", "text_encoder/fp16", "unet/fp32", "vae_encoder/fp32", "vae_decoder/fp32"]


def proto_of(bundle: Path, artifact: str) -> onnx.ModelProto:
    path = json.loads((bundle / "manifest.json").read_text())["artifacts"][artifact]["path"]
    return onnx.load(bundle / path, load_external_data=False)


@pytest.fixture(scope="module")
def whole(demo_bundle: Path) -> Inspection:
    return inspect(demo_bundle)


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("artifact", ALL)
def test_counts_agree_with_plain_onnx(demo_bundle: Path, whole: Inspection, artifact: str) -> None:
    proto = proto_of(demo_bundle, artifact)
    graph = next(g for g in whole.graphs if g.name == artifact)
    weights = [i for i in proto.graph.initializer if i.data_type in FLOATS and i.dims]
    elements: Counter[str] = Counter()
    for weight in weights:
        elements[FLOATS[weight.data_type][0]] += math.prod(weight.dims)
    sizes = sorted((math.prod(w.dims) * FLOATS[w.data_type][1] for w in weights), reverse=True)
    types = {v.name: NAMES[v.type.tensor_type.elem_type] for v in [*proto.graph.value_info, *proto.graph.output]}
    outputs = Counter(types[name] for node in proto.graph.node for name in node.output)
    assert graph.nodes == len(proto.graph.node)
    assert graph.operators == Counter(n.op_type for n in proto.graph.node)
    assert graph.parameters == elements.total()
    assert graph.weight_bytes == sum(sizes)
    assert [w.bytes for w in graph.largest] == sizes[:10]
    for what, counts in (("parameters", elements), ("outputs", outputs)):
        expected = {dtype: n / counts.total() for dtype, n in counts.items()}
        assert graph.precision[what] == pytest.approx(expected, abs=1e-6)
    assert not graph.warnings


def test_the_unet_has_the_parameters_of_its_source(whole: Inspection) -> None:
    source = Path(optimize.__file__).parent / "demo" / "unet" / "diffusion_pytorch_model.safetensors"
    with source.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    expected = sum(math.prod(v["shape"]) for k, v in header.items() if k != "__metadata__")
    graph = next(g for g in whole.graphs if g.name == "unet/fp32")
    assert expected <= graph.parameters <= expected + 64  # beside them the timestep's 16 frequencies


def test_a_bundle_is_summed_up(demo_bundle: Path, whole: Inspection) -> None:
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    assert whole.source == "demo"
    assert sorted(a.id for a in whole.artifacts) == sorted(ALL)
    for info in whole.artifacts:
        artifact = manifest["artifacts"][info.id]
        files = [artifact["path"], *(manifest["artifacts"][p]["path"] for p in artifact["parents"])]
        assert info.bytes == sum((demo_bundle / f).stat().st_size for f in files)
        assert info.parity == max(o["relative"] for s in artifact["parity"]["shapes"] for o in s["outputs"])
        assert info.nodes == artifact["spec"]["nodes"]
    unet = next(c for c in whole.components if c.name == "unet")
    assert (unet.role, unet.class_name) == ("unet", "UNet2DConditionModel")


def test_engines_are_listed_with_target_and_downgrades(demo_bundle: Path, tmp_path: Path) -> None:
    bundle = copy_of(demo_bundle, tmp_path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    made = manifest["artifacts"]["unet/fp32"]
    manifest["artifacts"]["unet/fp32/sm89"] = {
        **made,
        "id": "unet/fp32/sm89",
        "kind": "engine",
        "path": "unet/unet.engine",
        "bytes": 7,
        "parents": ["unet/fp32"],
        "spec": {"precision": "fp32", "target": "rtx-4090", "sm": 89},
        "parity": None,
        "downgrades": ["attention decomposed"],
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    engine = next(a for a in inspect(bundle).artifacts if a.kind == "engine")
    assert (engine.target, engine.downgrades, engine.bytes) == ("rtx-4090 (SM89)", ("attention decomposed",), 7)
    assert (engine.parity, engine.proof, engine.nodes) == (None, "of unet/fp32", None)
    assert [a.kind for a in inspect(bundle, precision="fp16").artifacts] == ["onnx"]


def test_inputs_and_axes(demo_bundle: Path) -> None:
    (graph,) = inspect(demo_bundle, component="unet").graphs
    assert [(t.name, t.dtype) for t in graph.inputs] == [
        ("sample", "float32"),
        ("timestep", "float32"),
        ("encoder_hidden_states", "float32"),
    ]
    assert graph.inputs[0].dims == ("batch", 4, "height/4", "width/4")
    axes = {a.name: a for a in graph.axes}
    assert axes["height"].range == "8:32:64" and axes["height"].where == ("sample[2]",)
    assert axes["batch"].where == ("sample[0]", "timestep[0]", "encoder_hidden_states[0]")
    assert graph.opset == 23 and graph.metadata["optimize.class"] == "UNet2DConditionModel"


def test_a_component_has_one_graph_and_a_precision_its_graphs(demo_bundle: Path) -> None:
    assert [g.name for g in inspect(demo_bundle, component="text_encoder").graphs] == ["text_encoder/fp32"]
    found = inspect(demo_bundle, component="text_encoder", precision="fp16")
    assert [g.name for g in found.graphs] == ["text_encoder/fp16"] == [a.id for a in found.artifacts]
    assert found.graphs[0].precision["parameters"] == {"float16": 1.0}
    assert [g.name for g in inspect(demo_bundle, precision="fp16").graphs] == ["text_encoder/fp16"]


# --- weights that are not there --------------------------------------------------------------------------------------


def copy_of(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "copy"))


def test_weights_are_not_needed(
    demo_bundle: Path, tmp_path: Path, whole: Inspection, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = copy_of(demo_bundle, tmp_path)
    weights = bundle / "unet" / "unet.fp32.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (cut,) = inspect(bundle, component="unet").graphs
    assert cut.warnings[0].startswith(f"its weights were cut: {weights} has 1000 bytes, the graph points at ")
    weights.unlink()
    (graph,) = inspect(bundle / "unet" / "unet.fp32.onnx").graphs
    assert graph.warnings == (f"its weights are missing: {weights}",)
    expected = next(g for g in whole.graphs if g.name == "unet/fp32")
    assert (graph.parameters, graph.weight_bytes, graph.largest) == (
        expected.parameters,
        expected.weight_bytes,
        expected.largest,
    )
    assert cli.main(["inspect", str(bundle), "--component", "unet"]) == 0
    assert "its weights are missing" in capsys.readouterr().err


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_tables(demo_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(demo_bundle)]) == 0
    text = capsys.readouterr().out
    assert all(artifact in text for artifact in ALL) and "(whole)" in text
    assert cli.main(["inspect", str(demo_bundle), "--component", "unet"]) == 0
    text = capsys.readouterr().out
    for words in ("opset 23, 291 nodes", "batch x 4 x height/4 x width/4", "Conv ", "conv1.weight", "8:32:64"):
        assert words in text
    assert cli.main(["inspect", str(demo_bundle), "--component", "unet", "--fusions"]) == 0
    text = capsys.readouterr().out
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1" in text and "totals" in text
    assert "opset 23 has no Swish (from 24 on)" in text


def test_json_has_all_of_it(demo_bundle: Path, whole: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(demo_bundle), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(dataclasses.asdict(whole)))
    assert list(printed) == ["path", "source", "components", "artifacts", "graphs"]
    assert list(printed["graphs"][0]) == [
        "name",
        "path",
        "file_bytes",
        "opset",
        "opsets",
        "ir_version",
        "producer",
        "metadata",
        "inputs",
        "outputs",
        "axes",
        "nodes",
        "operators",
        "parameters",
        "weight_bytes",
        "precision",
        "largest",
        "sites",
        "warnings",
    ]
    assert list(printed["graphs"][0]["sites"][0]) == ["path", "kind", "node", "standard", "into", "reason"]


BAD = {
    "nothing there": (["gone.onnx"], "does not exist"),
    "text": (["text.onnx"], "is no ONNX file"),
    "empty": (["empty.onnx"], "is no ONNX file(.|\n)*a graph without outputs"),
    "cut": (["cut.onnx"], "is no ONNX file"),
    "no bundle": (["folder"], "is no bundle(.|\n)*no manifest.json"),
    "component": (["bundle", "--component", "nose"], "no component nose(.|\n)*text_encoder, unet"),
    "a component's precision": (["bundle", "--component", "unet", "--precision", "bf16"], "no ONNX artifact in bf16"),
    "precision": (["bundle", "--precision", "bf16"], "nothing in bf16(.|\n)*one of fp16, fp32"),
    "component of a file": (["text.onnx", "--component", "unet"], "choose in a bundle"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (first, *words), expected = BAD[name]
    (tmp_path / "text.onnx").write_text("no graph at all\n")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "cut.onnx").write_bytes((demo_bundle / "unet" / "unet.fp32.onnx").read_bytes()[:9000])
    (tmp_path / "folder").mkdir()
    path = demo_bundle if first == "bundle" else tmp_path / first
    options = dict(zip([w.strip("-") for w in words[::2]], words[1::2], strict=True))
    with pytest.raises(InputError, match=expected):
        inspect(path, **options)
    assert cli.main(["inspect", str(path), *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("optimize: ") and "Traceback" not in captured.err and not captured.out


def test_the_public_name() -> None:
    assert optimize.inspect is inspecting.inspect


def test_scripts_beside_it_get_pythons_own_inspect() -> None:
    tools = Path(cli.__file__).resolve().parent
    code = f"import sys; sys.path.insert(0, {str(tools)!r}); import dataclasses, inspect; print(inspect.signature(len))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "(obj, /)\n", done.stderr
