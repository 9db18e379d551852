"""Bad input through the real command: the exit code, one clear message, no traceback, nothing that claims to be whole.

`run` calls the command's own entry point in this process; where a process of its own matters (signals, limits, what
lands on which stream) a real one is started.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import optimize
from optimize.compile.bundle import FAILED, MANIFEST, PARTIAL, Bundle
from optimize.errors import GateError, InputError
from optimize.tools.cli import main

DEMO = Path(optimize.__file__).parent / "demo"
COMMAND = [sys.executable, "-m", "optimize.tools.cli"]
TEXT = ("--component", "text_encoder")
GRAPH, WEIGHTS = "text_encoder/text_encoder.fp32.onnx", "text_encoder/text_encoder.fp32.safetensors"
VIEW, ENGINE = "text_encoder/text_encoder.fp32.view.onnx", "text_encoder/text_encoder.fp32.sm89.engine"
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No hub, and no cache of the user's."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPTIMIZE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> Ran:
        capsys.readouterr()
        try:
            code: Any = main([str(word) for word in words])
        except SystemExit as e:  # argparse
            code = e.code
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's text encoder in fp32. Copy it before changing it."""
    root = tmp_path_factory.mktemp("exported") / "b"
    assert main(["export", "demo", *TEXT, "--out", str(root)]) == 0
    return root


@pytest.fixture(scope="session")
def with_engine(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine") / "b"
    shutil.copytree(exported, root)
    assert main(["build", str(root), "--target", "sm89"]) == 0
    return root


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "b"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A transformers folder: the demo's text encoder."""
    return Path(shutil.copytree(DEMO / "text_encoder", tmp_path / "model"))


def check_message(ran: Ran, code: int, *words: str) -> None:
    """The code, nothing on stdout, and one message with what, got or expected, mend, and these words."""
    assert ran.code == code, ran.err
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert lines[0].startswith("optimize: ") and len([line for line in lines if line.startswith("optimize: ")]) == 1
    assert "Traceback" not in ran.err and "a bug of ours" not in ran.err
    assert "  mend: " in ran.err and ("  got: " in ran.err or "  expected: " in ran.err)
    for word in words:
        assert word in ran.err


def manifest(root: Path) -> Any:
    return json.loads((root / MANIFEST).read_text())


def claims_only_what_is_whole(root: Path) -> list[str]:
    """Ids of what the manifest claims, each looked at: its size, its digest, its parents."""
    if not (root / MANIFEST).exists():
        return []
    known = manifest(root)["artifacts"]
    for artifact in known.values():
        content = (root / artifact["path"]).read_bytes()
        assert len(content) == artifact["bytes"]
        assert hashlib.sha256(content).hexdigest() == artifact["sha256"]
        assert set(artifact["parents"]) <= known.keys()
    return list(known)


# --- words -----------------------------------------------------------------------------------------------------------

WORDS: dict[str, tuple[list[str], int, list[str]]] = {
    "source": (["nosuch"], 2, ["unknown source nosuch", "arch:NAME"]),
    "source, empty": ([""], 2, ["unknown source"]),
    "source, too long for a path": (["x" * 5000], 2, ["unknown source x"]),
    "source, three parts": (["a/b/c"], 2, ["unknown source a/b/c"]),
    "source, arch": (["arch:nosuch"], 2, ["unknown architecture nosuch", "sd15", "@tiny"]),
    "source, arch size": (["arch:sd15@huge"], 2, ["unknown architecture sd15@huge"]),
    "hub id that is not here": (["org/nosuch"], 3, ["org/nosuch", "not in the hub cache"]),
    "hub id that is none": (["org/no such!"], 2, ["neither a folder nor a hub id"]),
    "python, no module": (["python:nosuch_module:f"], 2, ["No module named 'nosuch_module'"]),
    "python, no factory": (["python:json:nosuch"], 2, ["no attribute 'nosuch'"]),
    "component": (["demo", "--component", "nosuch"], 2, ["unknown component nosuch", "text_encoder, unet"]),
    "precision": (["demo", "--precision", "fp7"], 2, ["unknown precision fp7", "fp32, fp16, bf16"]),
    "format": (["demo", "--format", "tflite"], 2, ["unknown format tflite", "onnx, tensorrt"]),
    "opset, too low": (["demo", "--opset", "17"], 2, ["opset 17", "18 to 25"]),
    "opset, too high": (["demo", "--opset", "26"], 2, ["opset 26", "18 to 25"]),
    "target that nothing here serves": (
        ["demo", "--target", "sm90"],
        3,
        ["sm90", "tensorrt_rtx", "sm89", "pip install"],
    ),
    "axis": (["demo", *TEXT, "--axis", "depth=4"], 2, ["unknown axis depth", "batch, tokens"]),
    "axis, no value": (["demo", *TEXT, "--axis", "tokens"], 2, ["not understood", "NAME=MIN:OPT:MAX"]),
    "axis, empty value": (["demo", *TEXT, "--axis", "tokens="], 2, ["not understood"]),
    "axis, two values": (["demo", *TEXT, "--axis", "tokens=1:4"], 2, ["not understood", "got: tokens=1:4"]),
    "axis, letters": (["demo", *TEXT, "--axis", "tokens=a"], 2, ["not understood"]),
    "axis, a fraction": (["demo", *TEXT, "--axis", "tokens=4.5"], 2, ["not understood", "whole numbers"]),
    "axis, negative": (["demo", *TEXT, "--axis", "tokens=-4"], 2, ["not understood", "got: tokens=-4"]),
    "axis, other digits": (["demo", *TEXT, "--axis", "batch=\u0663"], 2, ["not understood"]),
    "axis, nothing": (["demo", *TEXT, "--axis", "batch=0"], 2, ["cannot take 0", "at least 1"]),
    "axis, from nothing": (["demo", *TEXT, "--axis", "batch=0:1:4"], 2, ["cannot take 0"]),
    "axis, min above opt": (["demo", *TEXT, "--axis", "tokens=4:2:8"], 2, ["not in order", "4:2:8", "tokens=4:4:8"]),
    "axis, opt above max": (["demo", *TEXT, "--axis", "tokens=1:9:8"], 2, ["not in order", "1:9:8"]),
    "axis, more than the positions": (["demo", *TEXT, "--axis", "tokens=17"], 2, ["cannot take 17", "at most 16"]),
    "axis, range above the positions": (
        ["demo", *TEXT, "--axis", "tokens=1:8:32"],
        2,
        ["cannot take 32", "tokens=1:8:16"],
    ),
    "axis, beyond numbers": (["demo", *TEXT, "--axis", "batch=99999999999999999999"], 2, ["at most 2147483647"]),
    "axis, twice": (
        ["demo", *TEXT, "--axis", "tokens=4", "--axis", "tokens=8"],
        2,
        ["more than once", "tokens=4, tokens=8"],
    ),
    "height that the VAE cannot divide": (
        ["demo", "--component", "vae_decoder", "--axis", "height=33"],
        2,
        ["cannot take 33", "multiple of 4", "32 or 36"],
    ),
    "height range that it cannot": (
        ["demo", "--component", "vae_decoder", "--axis", "height=4:8:9"],
        2,
        ["cannot take 9", "multiple of 4"],
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_that_are_wrong(case: str, run: Run, tmp_path: Path) -> None:
    words, code, expected = WORDS[case]
    check_message(run("export", *words, "--out", tmp_path / "out"), code, *expected)
    assert not (tmp_path / "out").exists()


def test_unknown_target(run: Run, tmp_path: Path) -> None:
    ran = run("export", "demo", "--target", "gtx-9999", "--out", tmp_path / "out")
    assert ran.code == 2 and ran.out == ""
    assert "unknown target" in ran.err and "gtx-9999" in ran.err and "rtx-4090" in ran.err and "sm89" in ran.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "VERB"),
        (["explode"], "invalid choice: 'explode'"),
        (["export", "demo"], "--out"),
        (["export", "demo", "--out", "x", "--frobnicate"], "--frobnicate"),
        (["export", "demo", "--out", "x", "--opset", "abc"], "invalid int value: 'abc'"),
        (["export", "demo", "--out", "x", "--memory", "lots"], "lots is no size"),
        (["export", "demo", "--out", "x", "--memory", "infGB"], "infGB is no size"),
        (["export", "demo", "--out", "x", "--memory=-1GB"], "below zero"),
        (["build", "x", "--format", "tflite"], "invalid choice: 'tflite'"),
    ],
)
def test_words_that_are_no_command(words: list[str], expected: str, run: Run) -> None:
    ran = run(*words)
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("usage: optimize") and expected in ran.err.splitlines()[-1]


def test_debug_adds_the_traceback_and_keeps_the_code(run: Run, tmp_path: Path) -> None:
    ran = run("export", "nosuch", "--out", tmp_path / "out", "--debug")
    assert ran.code == 2 and ran.out == ""
    assert "Traceback (most recent call last)" in ran.err and "in source_from_text" in ran.err
    assert ran.err.splitlines()[-3].startswith("optimize: unknown source nosuch")


def test_a_static_axis_is_static_and_the_others_are_not(run: Run, tmp_path: Path) -> None:
    words = ("--component", "vae_decoder", "--axis", "height=32", "--axis", "width=8:16:32")
    assert run("export", "demo", *words, "--out", tmp_path / "b").code == 0
    graph = onnx.load(tmp_path / "b/vae_decoder/vae_decoder.fp32.onnx", load_external_data=False).graph
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert dims == [["batch", 4, 8, "width/4"], ["batch", 1, 32, "width"]]


def test_sizes_that_no_memory_holds(run: Run, tmp_path: Path) -> None:
    words = [w for axis in ("height=134217728", "width=134217728", "batch=1") for w in ("--axis", axis)]
    ran = run("export", "demo", "--component", "vae_decoder", *words, "--out", tmp_path / "out")
    check_message(ran, 3, "not enough memory", "vae_decoder", "--axis")
    assert not (tmp_path / "out").exists()


# --- sources ---------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_header(folder: Path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(folder: Path, old: bytes, new: bytes) -> None:
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    text = content[8 : 8 + length].replace(old, new)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def index(folder: Path, content: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def pickled(folder: Path, content: object, name: str = "pytorch_model.bin") -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / name)


BIAS = "text_model.final_layer_norm.bias"
SOURCES: dict[str, tuple[Callable[[Path], Any], int, list[str]]] = {
    "config that is no JSON": (
        lambda d: (d / "config.json").write_text('{"a":'),
        2,
        ["config.json", "not readable JSON"],
    ),
    "config that is no text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\0"), 2, ["not readable JSON"]),
    "config that is a list": (lambda d: (d / "config.json").write_text("[1]"), 2, ["not a config", "got: list"]),
    "config that is empty": (lambda d: (d / "config.json").write_text("{}"), 2, ["names no class", "model_type"]),
    "no config": (
        lambda d: (d / "config.json").unlink(),
        2,
        ["holds no model", "got: model.safetensors", "config.json"],
    ),
    "unknown diffusers class": (
        lambda d: rewrite(d, _class_name="NoSuchModel"),
        2,
        ["diffusers has no class NoSuchModel"],
    ),
    "diffusers class that is no network": (
        lambda d: rewrite(d, _class_name="DDIMScheduler"),
        2,
        ["DDIMScheduler has no"],
    ),
    "class that is no word": (lambda d: rewrite(d, _class_name=5), 2, ["no class 5"]),
    "unknown model type": (lambda d: rewrite(d, model_type="nosuch"), 2, ["cannot be made from its config", "nosuch"]),
    "unknown transformers class": (
        lambda d: rewrite(d, architectures=["NoSuch"]),
        2,
        ["transformers has no class NoSuch"],
    ),
    "class of another config": (lambda d: rewrite(d, architectures=["BertModel"]), 2, ["BertModel cannot be made"]),
    "config value of a wrong type": (lambda d: rewrite(d, hidden_size="x"), 2, ["cannot be made", "hidden_size"]),
    "config value that cannot be": (lambda d: rewrite(d, hidden_size=65), 2, ["cannot be made", "65"]),
    "config of another model": (lambda d: rewrite(d, hidden_size=128), 2, ["wrong shape", "[586, 64]", "[586, 128]"]),
    "remote code": (
        lambda d: rewrite(d, auto_map={"AutoModel": "x.X"}),
        2,
        ["Python code of its own", "--trust-remote-code"],
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        2,
        ["has no weights", "got: config.json", ".safetensors"],
    ),
    "weights cut": (
        lambda d: cut(d / "model.safetensors", 0.5),
        2,
        ["truncated", "bytes by its own header", "fetch it again"],
    ),
    "weights cut in the header": (
        lambda d: cut(d / "model.safetensors", 0.001),
        2,
        ["not a readable safetensors file"],
    ),
    "weights of no bytes": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        2,
        ["not a readable safetensors file"],
    ),
    "weights with a tail": (
        lambda d: (d / "model.safetensors").open("ab").write(b"xx"),
        2,
        ["truncated or has been changed"],
    ),
    "a pointer of git lfs": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3),
        2,
        ["not a readable safetensors file", "fetch it again"],
    ),
    "header that is a list": (lambda d: write_header(d, [1, 2]), 2, ["not a readable safetensors file"]),
    "header entry that is a number": (lambda d: write_header(d, {"a": 5}), 2, ["not a readable safetensors file"]),
    "header entry without a place": (lambda d: write_header(d, {"a": {"dtype": "F32"}}), 2, ["not a readable"]),
    "header with an unknown type": (lambda d: change_header(d, b'"F32"', b'"Q99"'), 2, ["not a readable", "Q99"]),
    "header whose shapes do not fit": (
        lambda d: change_header(d, b'"shape":[64]', b'"shape":[63]'),
        2,
        ["not a readable"],
    ),
    "header of nothing": (
        lambda d: write_header(d, {}),
        2,
        ["36 weights are missing", "all 36 tensors of CLIPTextModel"],
    ),
    "a tensor missing": (
        lambda d: change_tensors(d, lambda s: s.pop(BIAS)),
        2,
        ["1 weights are missing", "no final_layer_norm.bias"],
    ),
    "a tensor of a wrong shape": (
        lambda d: change_tensors(d, lambda s: s.update({BIAS: torch.zeros(63)})),
        2,
        ["wrong shape", "[63]", "[64]"],
    ),
    "a quantized tensor": (
        lambda d: change_tensors(d, lambda s: s.update({BIAS: s[BIAS].to(torch.int8)})),
        2,
        ["whole numbers", "got: I8"],
    ),
    "a tensor with NaN": (
        lambda d: change_tensors(d, lambda s: s[BIAS].fill_(torch.nan)),
        1,
        ["eager fp32 itself", "NaN in last_hidden_state"],
    ),
    "shards missing": (
        lambda d: index(
            d,
            {"weight_map": dict(zip("abc", ["m-1.safetensors", "m-2.safetensors", "model.safetensors"], strict=True))},
        ),
        2,
        ["2 of 3 weight files are missing", "m-1.safetensors, m-2.safetensors"],
    ),
    "index without a map": (lambda d: index(d, {"metadata": {}}), 2, ["lists no weight files", "no weight_map"]),
    "index whose map is a list": (lambda d: index(d, {"weight_map": [1]}), 2, ["lists no weight files"]),
    "index that leaves the folder": (
        lambda d: index(d, {"weight_map": {"a": "../x.safetensors"}}),
        2,
        ["lists no weight files", "../x.safetensors"],
    ),
    "pickled": (
        lambda d: pickled(d, {"a": torch.zeros(1)}),
        2,
        ["are pickled", "pytorch_model.bin", "--allow-pickle", "run code"],
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources_that_are_broken(case: str, run: Run, model: Path, tmp_path: Path) -> None:
    break_it, code, expected = SOURCES[case]
    break_it(model)
    check_message(run("export", model, "--out", tmp_path / "out"), code, *expected)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert [p.name for p in tmp_path.glob("out/*")] in ([], [FAILED])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p.mkdir(), ["holds no model", "got: nothing", "model_index.json"]),
        (lambda p: (p.mkdir(), (p / "readme.txt").write_text("x")), ["holds no model", "got: readme.txt"]),
        (lambda p: p.write_text("x"), ["the source is a file", "model_index.json or config.json"]),
    ],
    ids=["empty folder", "folder without configs", "file"],
)
def test_sources_that_are_no_model(make: Callable[[Path], Any], expected: list[str], run: Run, tmp_path: Path) -> None:
    make(tmp_path / "source")
    check_message(run("export", tmp_path / "source", "--out", tmp_path / "out"), 2, *expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("{", ["model_index.json is not readable JSON"]),
        ('{"_class_name": "X"}', ["no network with a config"]),
        ('{"unet": ["diffusers"]}', ["no network with a config"]),
        ('{"../x": ["diffusers", "AutoencoderKL"]}', ["no network with a config"]),
        ('{"unet": ["my_unet", "MyUNet"]}', ["unet: MyUNet comes from Python code"]),
        ('{"prior": ["diffusers", "UNet2DConditionModel"]}', ["prior: UNet2DConditionModel", "no prior/config.json"]),
    ],
)
def test_pipelines_that_are_broken(change: str, expected: list[str], run: Run, tmp_path: Path) -> None:
    """What a pipeline names is exported or refused, never left out without a word."""
    pipeline = shutil.copytree(DEMO, tmp_path / "pipeline")
    (pipeline / "model_index.json").write_text(change)
    check_message(run("export", pipeline, "--out", tmp_path / "out"), 2, *expected)
    assert not (tmp_path / "out").exists()


def test_a_broken_part_of_a_pipeline_does_not_stand_in_the_way_of_the_others(run: Run, tmp_path: Path) -> None:
    pipeline = shutil.copytree(DEMO, tmp_path / "pipeline")
    (pipeline / "unet" / "config.json").write_text("{")
    shutil.rmtree(pipeline / "vae")
    check_message(run("export", pipeline, "--out", tmp_path / "b"), 2, "unet/config.json")
    rewritten = json.loads((pipeline / "model_index.json").read_text()) | {"unet": ["my_unet", "MyUNet"]}
    (pipeline / "model_index.json").write_text(json.dumps(rewritten))
    (pipeline / "unet" / "config.json").write_text("{}")
    ran = run("export", pipeline, "--component", "vae_decoder", "--out", tmp_path / "b")
    check_message(ran, 2, "vae: AutoencoderKL")
    assert run("export", pipeline, *TEXT, "--out", tmp_path / "b").code == 0
    assert run("verify", tmp_path / "b").code == 0


class Evil:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "it ran")


@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))], ids=["torch", "pickle"])
def test_a_malicious_pickle_runs_nothing(
    write: Callable[[Any, Path], Any], run: Run, model: Path, tmp_path: Path
) -> None:
    pickled(model, {})
    write({"weight": Evil(tmp_path / "evil")}, model / "pytorch_model.bin")
    check_message(run("export", model, "--out", tmp_path / "out"), 2, "are pickled", "--allow-pickle")
    ran = run("export", model, "--allow-pickle", "--out", tmp_path / "out")
    check_message(ran, 2, "pytorch_model.bin cannot be read as a state dict", "refused", "safe_serialization=True")
    assert "weights_only" not in ran.err  # torch's advice to switch its check off is not ours
    assert not (tmp_path / "evil").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "EOFError"),
        (b"garbage", "Unsupported operand"),
        ([1, 2], "holds no tensors by name"),
        ({"a": 5}, "holds no tensors"),
        ({"a": torch.zeros(1)}, "36 weights are missing"),
    ],
    ids=["empty", "garbage", "a list", "numbers", "another model"],
)
def test_pickles_that_hold_no_weights(content: Any, expected: str, run: Run, model: Path, tmp_path: Path) -> None:
    pickled(model, {} if isinstance(content, bytes) else content)
    if isinstance(content, bytes):
        (model / "pytorch_model.bin").write_bytes(content)
    check_message(run("export", model, "--allow-pickle", "--out", tmp_path / "out"), 2, expected)


def test_a_pickled_state_dict_works_when_it_is_allowed(run: Run, exported: Path, model: Path, tmp_path: Path) -> None:
    """The same numbers, whether pickled or not; a trainer's arguments beside them are not weights."""
    pickled(model, {"state_dict": load_file(model / "model.safetensors"), "epoch": 3})
    torch.save({"args": Evil(tmp_path / "evil")}, model / "training_args.bin")
    assert run("export", model, "--allow-pickle", "--out", tmp_path / "b").code == 0
    assert manifest(tmp_path / "b")["trust"] == ["pickle"]
    assert run("verify", tmp_path / "b").code == 0
    ours, known = load_file(tmp_path / "b/model/model.fp32.safetensors"), load_file(exported / WEIGHTS)
    assert ours.keys() == known.keys() and all(torch.equal(ours[k], known[k]) for k in known)
    assert not (tmp_path / "evil").exists()


FACTORY = """
import torch
from optimize import Axis, Component, TensorSpec
print("this module was imported")
class Net(torch.nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong, self.linear = wrong, torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.linear(x) * (1.01 if self.wrong and torch.compiler.is_exporting() else 1.0)
def component(wrong):
    torch.manual_seed(0)
    return Component.from_module(Net(wrong), [TensorSpec("x", ("batch", 8))], ["y"], [Axis("batch", 1, 1, 8)])
def right(): return component(False)
def wrong(): return component(True)
def fails(): raise ValueError("these words")
def nothing(): return None
def wants(argument): return argument
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    (tmp_path / f"{name}_broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield f"python:{name}"
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (":fails", ["failed", "ValueError: these words"]),
        (":nothing", ["returned no Component", "got: NoneType"]),
        (":wants", ["failed", "missing 1 required positional argument"]),
        (":absent", ["no attribute 'absent'"]),
        ("_broken:f", ["SyntaxError"]),
    ],
)
def test_factories_that_fail(factory: str, expected: list[str], run: Run, factories: str, tmp_path: Path) -> None:
    ran = run("export", factories + factory, "--out", tmp_path / "out")
    check_message(Ran(ran.code, ran.out, ran.err.replace("this module was imported\n", "")), 2, *expected)
    assert not (tmp_path / "out").exists()


def test_what_a_factory_prints_is_no_result(run: Run, factories: str, tmp_path: Path) -> None:
    ran = run("export", f"{factories}:right", "--out", tmp_path / "b", "--json")
    assert ran.code == 0 and [row["artifact"] for row in json.loads(ran.out)] == ["model/fp32"]
    assert "this module was imported" in ran.err


def test_a_bundle_of_python_code_runs_it_only_where_it_is_trusted(run: Run, factories: str, tmp_path: Path) -> None:
    """Whoever verifies a bundle from elsewhere has not agreed to run what its manifest names."""
    assert run("export", f"{factories}:right", "--out", tmp_path / "b").code == 0
    del sys.modules[factories.removeprefix("python:")]
    ran = run("verify", tmp_path / "b")
    check_message(ran, 2, "is Python code", f"{factories}:right", "--trust-remote-code")
    assert "was imported" not in ran.err
    with pytest.raises(InputError, match="is Python code"):
        optimize.load(tmp_path / "b")["model"].runner("eager")
    assert optimize.load(tmp_path / "b")["model"].runner("onnxruntime")
    assert run("verify", tmp_path / "b", "--trust-remote-code").code == 0


def test_a_missed_gate_says_where_and_claims_nothing(run: Run, factories: str, tmp_path: Path) -> None:
    """A network that computes something else when it is exported."""
    ran = run("export", f"{factories}:wrong", "--out", tmp_path / "out")
    silent = Ran(ran.code, ran.out, ran.err.replace("this module was imported\n", ""))
    check_message(silent, 1, "parity missed: model fp32, output y", "relative error 0.01", "reproduce: polygraphy run")
    assert not (tmp_path / "out" / MANIFEST).exists()
    kept = {p.name for p in (tmp_path / "out" / FAILED / "model.fp32").iterdir()}
    assert {"model.fp32.onnx", "inputs.json", "reference.json"} <= kept
    assert run("export", f"{factories}:right", "--out", tmp_path / "out").code == 0


# --- where it is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda t: t / "file", "--out is a file"),
        (lambda t: t / "file" / "below", "Not a directory"),
        (lambda t: Path("/proc/nowhere/out"), "cannot be written"),
        (lambda t: Path("/dev/null/out"), "cannot be written"),
        (lambda t: t / "dangling", "cannot be written"),
        (lambda t: t / ("x" * 300), "File name too long"),
    ],
    ids=["a file", "below a file", "in /proc", "below a device", "a link to nowhere", "a name too long"],
)
def test_folders_that_cannot_be_written(make: Callable[[Path], Path], expected: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "no" / "where")
    check_message(run("export", "demo", *TEXT, "--out", make(tmp_path)), 2, expected, "another --out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights(run: Run, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    ran = run("export", "demo", *TEXT, "--out", tmp_path / "locked")
    check_message(ran, 2, "cannot be written", "Permission denied")


def test_a_folder_of_something_else_is_left_alone(run: Run, model: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in model.iterdir()}
    check_message(run("export", "demo", *TEXT, "--out", model), 2, "not empty and no bundle", "config.json")
    check_message(run("export", model, "--out", model), 2, "not empty and no bundle")
    assert {p: p.read_bytes() for p in model.iterdir()} == before


def test_a_bundle_of_another_source_is_left_alone(run: Run, bundle: Path) -> None:
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    for words in ((), ("--dry-run",)):
        ran = run("export", "arch:bert-base@tiny", "--out", bundle, *words)
        check_message(ran, 2, "the bundle of another source", "got: demo", "expected: arch:bert-base@tiny")
    assert {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()} == before


def test_a_bundle_that_claims_nothing_can_become_another(run: Run, tmp_path: Path) -> None:
    """What a run that was killed early leaves does not hold the folder for its source."""
    created = Bundle.create(tmp_path / "b", "arch:gpt2", [])
    created._lock.close()
    assert run("export", "demo", *TEXT, "--out", tmp_path / "b").code == 0
    assert manifest(tmp_path / "b")["source"] == "demo"


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no such limit here")
@pytest.mark.parametrize("most_bytes", [100, 100_000], ids=["the manifest", "the weights"])
def test_no_room_for(most_bytes: int, run: Run, tmp_path: Path) -> None:
    """A write that fails in the middle, as on a full disk or over a quota."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, old[1]))
    try:
        ran = run("export", "demo", *TEXT, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    check_message(ran, 3, "no space left", "File too large", "free some")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    (tmp_path / "disk").mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path / "disk")]
    mounted = subprocess.run(words, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no rights to mount a small disk")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=True)  # a parser may still have a file of it mapped


def test_a_disk_that_is_too_small_is_said_before_the_work(run: Run, small_disk: Path) -> None:
    ran = run("export", "demo", *TEXT, "--out", small_disk / "b")
    check_message(ran, 3, "not enough space for text_encoder", "GB free")
    assert not list(small_disk.iterdir())


@needs_rtx
def test_a_disk_that_fills_up(run: Run, small_disk: Path, exported: Path) -> None:
    root = Path(shutil.copytree(exported, small_disk / "b"))
    check_message(run("build", root, "--target", "sm89"), 3, "no space left", "what was finished is kept")
    assert "text_encoder/fp32" in claims_only_what_is_whole(root)
    assert not list(root.rglob("*.engine")) and not (root / PARTIAL).exists()


# --- bundles that are damaged ----------------------------------------------------------------------------------------


def edit(*path: str, value: object) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        content = manifest(root)
        *parents, last = path
        place = content
        for name in parents:
            place = place[name]
        place[last] = value
        (root / MANIFEST).write_text(json.dumps(content))

    return change


ART = ("artifacts", "text_encoder/fp32")
MANIFESTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "cut": (lambda d: cut(d / MANIFEST, 0.5), ["cannot be read", "whole JSON", "cut or changed"]),
    "of no bytes": (lambda d: (d / MANIFEST).write_text(""), ["cannot be read"]),
    "no text": (lambda d: (d / MANIFEST).write_bytes(b"\xff\0"), ["cannot be read"]),
    "a list": (lambda d: (d / MANIFEST).write_text("[]"), ["not a valid manifest", "valid dictionary"]),
    "of another schema": (edit("schema_version", value=99), ["another schema", "got: 99", "expected: 1"]),
    "of no schema": (lambda d: (d / MANIFEST).write_text("{}"), ["another schema", "got: none"]),
    "with a word too many": (edit("extra", value=1), ["not a valid manifest", "extra"]),
    "with a path up": (
        edit(*ART, "path", value="../x.onnx"),
        ["not a valid manifest", "'../x.onnx' leaves the bundle"],
    ),
    "with a path up inside": (edit(*ART, "path", value="a/../../x"), ["leaves the bundle"]),
    "with an absolute path": (edit(*ART, "path", value="/etc/passwd"), ["'/etc/passwd' leaves the bundle"]),
    "with an empty path": (edit(*ART, "path", value=""), ["leaves the bundle"]),
    "with an artifact of another name": (edit(*ART, "id", value="x"), ["not a valid manifest", "calls itself x"]),
    "with an artifact of no component": (
        edit(*ART, "component", value="x"),
        ["not a valid manifest", "of component x"],
    ),
    "with an unknown precision": (
        edit(*ART, "spec", value={"precision": "fp99"}),
        ["not a valid manifest", "precision fp99"],
    ),
    "with no precision": (edit(*ART, "spec", value={}), ["not a valid manifest", "precision None"]),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_are_broken(case: str, run: Run, bundle: Path) -> None:
    break_it, expected = MANIFESTS[case]
    break_it(bundle)
    before = (bundle / MANIFEST).read_bytes()
    export, build = ("export", "demo", *TEXT, "--out", bundle), ("build", bundle, "--target", "sm89")
    for words in (("verify", bundle), export, build):
        check_message(run(*words), 2, MANIFEST, *expected, "export again")
    assert (bundle / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("verb", [["verify"], ["build", "--target", "sm89"]])
def test_folders_that_are_no_bundle(verb: list[str], run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nosuch", tmp_path / "file"):
        check_message(run(verb[0], path, *verb[1:]), 2, "is no bundle", "no manifest.json", "optimize export SOURCE")


def test_a_bundle_that_claims_nothing_is_not_verified(run: Run, bundle: Path) -> None:
    edit("artifacts", value={})(bundle)
    check_message(run("verify", bundle), 2, "no artifact to verify")
    check_message(run("build", bundle, "--target", "sm89"), 2, "no ONNX artifact")


def test_words_about_a_bundle(run: Run, bundle: Path) -> None:
    check_message(run("verify", bundle, "--component", "nosuch"), 2, "no component nosuch", "text_encoder")
    check_message(run("build", bundle, "--target", "sm89", "--component", "nosuch"), 2, "unknown component nosuch")
    check_message(run("build", bundle, "--target", "sm89", "--precision", "fp16"), 2, "unknown precision fp16", "fp32")
    check_message(run("build", bundle, "--target", "sm90"), 3, "sm90", "tensorrt_rtx", "sm89")
    assert len(claims_only_what_is_whole(bundle)) == 3


def failures(ran: Ran) -> dict[str, str]:
    """Artifact -> why, of a verification that failed; its rows are results and lie on stdout."""
    assert ran.code == 1
    assert ran.err.startswith("optimize: ") and "did not pass" in ran.err and "Traceback" not in ran.err
    found = {row["artifact"]: row["detail"] for row in json.loads(ran.out) if row["state"] == "failed"}
    assert found and all(id_ in ran.err for id_ in found)
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda p: cut(p, 0.9), "was cut or changed"),
        (flip, "is not the file that was proved"),
        (Path.unlink, "is missing"),
    ],
    ids=["cut", "changed", "gone"],
)
@pytest.mark.parametrize(
    ("file", "failing"),
    [
        (GRAPH, {"text_encoder/fp32", "text_encoder/fp32/view"}),
        (WEIGHTS, {"text_encoder/fp32", "text_encoder/fp32/weights"}),
        (VIEW, {"text_encoder/fp32/view"}),
    ],
)
def test_files_that_are_damaged(
    damage: Callable[[Path], Any], word: str, file: str, failing: set[str], *, run: Run, bundle: Path
) -> None:
    """Verifying says so, running is refused, exporting again mends it."""
    damage(bundle / file)
    found = failures(run("verify", bundle, "--json"))
    assert found.keys() == failing
    assert all(f"{file} {word}" in detail and "optimize export" in detail for detail in found.values())
    if file != VIEW:
        with pytest.raises(GateError, match=word):
            optimize.load(bundle)["text_encoder"].runner()
    ran = run("export", "demo", *TEXT, "--out", bundle, "--why")
    assert ran.code == 0 and "file missing or changed" in ran.err
    assert run("verify", bundle).code == 0


@needs_rtx
@pytest.mark.parametrize(("damage", "word"), [(lambda p: cut(p, 0.9), "was cut"), (flip, "is not the file that was")])
def test_an_engine_whose_digest_is_wrong(
    damage: Callable[[Path], Any], word: str, run: Run, with_engine: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(with_engine, tmp_path / "b"))
    assert run("verify", root).code == 0
    damage(root / ENGINE)
    found = failures(run("verify", root, "--json"))
    assert found.keys() == {"text_encoder/fp32/sm89"} and f"{ENGINE} {word}" in found["text_encoder/fp32/sm89"]
    assert run("build", root, "--target", "sm89").code == 0
    assert run("verify", root).code == 0


@pytest.mark.parametrize("folder", [False, True], ids=["a file", "its folder"])
def test_links_that_leave_the_bundle(folder: bool, run: Run, bundle: Path, tmp_path: Path) -> None:
    path = bundle / "text_encoder" if folder else bundle / WEIGHTS
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    found = failures(run("verify", bundle, "--json"))
    assert "leads out of the bundle" in found["text_encoder/fp32"]
    with pytest.raises(GateError, match="leads out of the bundle"):
        optimize.load(bundle)["text_encoder"].runner()
    outside = {p: p.read_bytes() for p in [tmp_path / "outside", *(tmp_path / "outside").rglob("*")] if p.is_file()}
    ran = run("export", "demo", *TEXT, "--out", bundle)
    if folder:  # nothing is written through the link
        check_message(ran, 2, "leads out of the bundle", "remove the link")
    else:  # the link is replaced by a file
        assert ran.code == 0 and not path.is_symlink() and run("verify", bundle).code == 0
    assert {p: p.read_bytes() for p in outside} == outside


@pytest.mark.parametrize(
    "location",
    [
        "../../outside.safetensors",
        "/etc/passwd",
        "nosuch.safetensors",
        "../text_encoder/text_encoder.fp32.safetensors",
        "text_encoder.fp32.view.onnx",
    ],
)
def test_external_data_that_is_no_part_of_the_artifact(location: str, run: Run, bundle: Path, tmp_path: Path) -> None:
    """A graph that somebody changed, with a manifest that agrees: it reads nothing but its own weights."""
    shutil.copy(bundle / WEIGHTS, tmp_path / "outside.safetensors")
    graph = onnx.load(bundle / GRAPH, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    content = graph.SerializeToString()
    (bundle / GRAPH).write_bytes(content)
    edit(*ART, "bytes", value=len(content))(bundle)
    edit(*ART, "sha256", value=hashlib.sha256(content).hexdigest())(bundle)
    found = failures(run("verify", bundle, "--json"))
    assert "takes weights from a file that is no part of it" in found["text_encoder/fp32"]
    assert location in found["text_encoder/fp32"]
    with pytest.raises(GateError, match="no part of it"):
        optimize.load(bundle)["text_encoder"].runner()
    check_message(run("build", bundle, "--target", "sm89"), 1, "no part of it", location)


# --- sources that change ---------------------------------------------------------------------------------------------


def test_weights_that_changed_after_the_export(run: Run, model: Path, tmp_path: Path) -> None:
    """Verifying says so; exporting again takes back whatever was made of the old ones, also what it does not remake."""
    root = tmp_path / "b"
    for opset in (23, 18):
        assert run("export", model, "--opset", opset, "--out", root).code == 0
    engine = find_spec("tensorrt_rtx") is not None
    if engine:
        assert run("build", root, "--target", "sm89").code == 0
    assert len(manifest(root)["artifacts"]) == (7 if engine else 5)
    change_tensors(model, lambda s: s[BIAS].mul_(1.5).add_(1))
    found = failures(run("verify", root, "--json"))
    assert found.keys() == {"model/fp32", "model/fp32/opset18"}
    assert all("source's weights are not those" in detail for detail in found.values())
    assert "changed: weights" in run("export", model, "--out", root, "--dry-run", "--why").out
    assert run("export", model, "--out", root).code == 0
    assert set(claims_only_what_is_whole(root)) == {"model/fp32", "model/fp32/weights", "model/fp32/view"}
    assert not list(root.rglob("*.engine")) and not list(root.rglob("*opset18*.onnx"))
    assert run("verify", root).code == 0


def test_a_source_that_is_gone_or_was_named_from_elsewhere(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("export", "model", "--out", "b").code == 0
    monkeypatch.chdir("/")
    assert run("verify", tmp_path / "b").code == 0
    assert run("export", model, "--out", tmp_path / "b", "--dry-run").code == 0  # the same source in other words
    shutil.rmtree(model)
    check_message(run("verify", tmp_path / "b"), 2, "cannot be read any more", str(model), "put it back")
    with optimize.load(tmp_path / "b")["model"].runner() as runner:  # what was proved runs without it
        assert runner.infer({"input_ids": torch.zeros(1, 4, dtype=torch.int64)})["pooler_output"].shape == (1, 64)
    if find_spec("tensorrt_rtx"):
        assert run("build", tmp_path / "b", "--target", "sm89").code == 0


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_killed_at_any_moment(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder before and after every rename is what `kill -9` would leave there: each claims only what is whole,
    and an export goes on from it. First a new bundle, then one whose artifacts are replaced."""
    root, snapshots = tmp_path / "b", []
    real = Path.replace

    def replace(self: Path, target: Any) -> Any:
        for after in (False, True):
            result = real(self, target) if after else None
            if root in self.parents:
                snapshots.append(shutil.copytree(root, tmp_path / "snapshots" / str(len(snapshots))))
        return result

    monkeypatch.setattr(Path, "replace", replace)
    assert run("export", model, "--out", root).code == 0
    new = len(snapshots)
    change_tensors(model, lambda s: s[BIAS].mul_(2).add_(1))
    assert run("export", model, "--out", root).code == 0
    monkeypatch.undo()
    monkeypatch.setenv("OPTIMIZE_CACHE", str(tmp_path / "cache"))
    whole = [len(claims_only_what_is_whole(s)) for s in snapshots]
    assert len(snapshots) >= 20 and set(whole) == {0, 3} and whole[0] == 0 and whole[new] == 3 and whole[-1] == 3
    for number in (0, new - 3, new + 4):  # before the first claim; files in place but not claimed; replaced in part
        assert run("export", model, "--out", snapshots[number]).code == 0
        assert run("verify", snapshots[number]).code == 0
        assert not (snapshots[number] / PARTIAL).exists() and not list(snapshots[number].glob(f".{MANIFEST}*"))


def start(root: Path, *components: str) -> subprocess.Popen[str]:
    words = [w for c in components for w in ("--component", c)]
    return subprocess.Popen(
        [*COMMAND, "export", "demo", *words, "--out", str(root)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - tests behind `&` ignore it
    )


def wait_for_claim(root: Path, id_: str, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if process.poll() is not None or ((root / MANIFEST).exists() and id_ in manifest(root)["artifacts"]):
            break
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_interrupted_in_the_middle(
    how: signal.Signals, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process, stopped after its first artifact; while it works nobody else may write there."""
    root = tmp_path / "b"
    components = ("text_encoder", "vae_encoder")
    process = start(root, *components)
    try:
        wait_for_claim(root, "text_encoder/fp32", process)
        process.send_signal(signal.SIGSTOP)  # it stays where it is while the others try
        check_message(run("export", "demo", *TEXT, "--out", root), 2, "another process writes to", "wait for it")
        check_message(run("build", root, "--target", "sm89"), 2, "another process writes to")
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out == "" and "Traceback" not in err
    if how == signal.SIGINT:
        assert process.returncode == 130 and err.startswith("optimize: interrupted; what was finished is kept")
        assert not (root / PARTIAL).exists()
    else:
        assert process.returncode == -signal.SIGKILL and err == ""
    claimed = claims_only_what_is_whole(root)
    assert "text_encoder/fp32" in claimed and "vae_encoder/fp32" not in claimed
    kept = {id_: (root / manifest(root)["artifacts"][id_]["path"]).stat().st_mtime_ns for id_ in claimed}
    exporter = manifest(root)["artifacts"]["text_encoder/fp32"]["key"]["exporter"]
    monkeypatch.setattr("optimize.exporting.exporter_digest", lambda: exporter)  # whoever edits the code meanwhile
    ran = run("export", "demo", *(w for c in components for w in ("--component", c)), "--out", root, "--json", "--why")
    assert ran.code == 0 and "unchanged" in ran.err
    assert [row["artifact"] for row in json.loads(ran.out)] == [f"{c}/fp32" for c in components]
    assert kept == {id_: (root / manifest(root)["artifacts"][id_]["path"]).stat().st_mtime_ns for id_ in claimed}
    assert len(claims_only_what_is_whole(root)) == 6 and not (root / PARTIAL).exists()
    assert run("verify", root).code == 0


def test_the_lock_is_given_back(tmp_path: Path) -> None:
    """A bundle that the caller keeps does not stand in the way of the next export in the same process."""
    kept = [optimize.export("demo", tmp_path / "b", components=["text_encoder"], opset=opset) for opset in (23, 22)]
    assert len(kept[1].artifacts(kind="onnx")) == 2


# --- streams ---------------------------------------------------------------------------------------------------------


def test_what_lands_where_in_a_real_process(exported: Path, tmp_path: Path) -> None:
    def call(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, check=False)

    done = call("verify", exported, "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert {row["state"] for row in json.loads(done.stdout)} == {"passed"}
    bad = call("export", "demo", "--precision", "fp7", "--out", tmp_path / "out")
    check_message(Ran(bad.returncode, bad.stdout, bad.stderr), 2, "unknown precision fp7")
    assert call().returncode == 2
    sheets = call("targets", "--json")
    assert sheets.returncode == 0 and "rtx-4090" in [row["name"] for row in json.loads(sheets.stdout)]


@pytest.mark.parametrize(
    ("after", "code", "word"),
    [
        ("| head -c 1 > /dev/null", 0, ""),
        ("> /dev/full", 3, "No space left on device"),
    ],
)
def test_a_stdout_that_takes_no_more(after: str, code: int, word: str) -> None:
    command = f"set -o pipefail; {' '.join(COMMAND)} targets --json {after}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code and word in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
