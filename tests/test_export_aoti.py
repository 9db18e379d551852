"""`--format aoti` end to end: packages are compiled, proved, kept, refused on other machines, loaded and verified."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import optimize
from optimize.compile.aoti import AotiRunner, Built, built_of
from optimize.compile.bundle import FAILED, Bundle
from optimize.compile.feeds import feeds_for
from optimize.errors import GateError, InputError, MissingError
from optimize.loading import component_of, recorded_component, verify
from optimize.tools.cli import main

FACTORY = """
import torch
from torch import nn
from optimize.compile.spec import Axis, Component, TensorSpec

class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 12), nn.LayerNorm(12)
        self.mix, self.out = nn.Conv1d(12, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x, ids):
        y = self.mix(x.transpose(1, 2)).transpose(1, 2) + self.words(ids)
        z = torch.softmax(y @ y.transpose(1, 2) / 4, -1) @ self.norm(y)
        return self.out(torch.nn.functional.silu(z)), z.square()

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.shape[0] < 3 else self.layer(x) * 2

SEED = 0

def mixer():
    torch.manual_seed(SEED)
    inputs = [TensorSpec("x", ("batch", "tokens/2", 12)), TensorSpec("ids", ("batch", "tokens/2"), "int64", "ids:11")]
    axes = [Axis("batch", 1, 1, 9), Axis("tokens", 2, 16, 160, 2)]
    return Component.from_module(Mixer(), inputs, ["y", "square"], axes)

def fixed():
    return Component.from_module(Fixed(), [TensorSpec("x", ("batch", 4))], ["y"], [Axis("batch", 1, 1, 8)])
"""
NAME = "aoti_factories"
SOURCE = f"python:{NAME}:mixer"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def factories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler (g++ or clang++)")
    folder = tmp_path_factory.mktemp("factories")
    (folder / f"{NAME}.py").write_text(FACTORY)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop(NAME, None)


@pytest.fixture(scope="module")
def made(factories: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixer as a package in fp32 with its graph beside it, and in fp16. Read it, do not write."""
    out = tmp_path_factory.mktemp("aoti") / "b"
    optimize.export(SOURCE, out, formats=["onnx", "aoti"])
    optimize.export(SOURCE, out, formats=["aoti"], precisions=["fp16"])
    return out


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "b"))


def package_of(folder: Path, id_: str = "model/fp32/aoti") -> Path:
    bundle = Bundle.read(folder)
    return bundle.path(bundle.manifest.artifacts[id_])


# --- what a bundle has -----------------------------------------------------------------------------------------------


def test_the_manifest_says_how_it_was_made_and_proved(made: Path) -> None:
    bundle = Bundle.read(made)
    assert [a.id for a in bundle.artifacts(kind="onnx")] == ["model/fp32"], "fp16 was asked for as a package alone"
    assert {a.id for a in bundle.artifacts(kind="aoti")} == {"model/fp32/aoti", "model/fp16/aoti"}
    artifact = bundle.manifest.artifacts["model/fp32/aoti"]
    assert artifact.path == "model/model.fp32.aoti.pt2" and not artifact.parents
    assert artifact.spec["torch"] == artifact.versions["torch"] == torch.__version__
    assert artifact.spec["isa"] and set(artifact.spec["instructions"]) <= set(torch.cpu.get_capabilities())
    assert (artifact.key["device"], artifact.spec["device"], artifact.spec["precision"]) == ("cpu", "cpu", "fp32")
    assert list(artifact.seconds) == ["export", "compile", "parity"]
    assert artifact.parity is not None and artifact.parity.backend == "AOTInductor cpu" and artifact.parity.passed
    assert [s.name for s in artifact.parity.shapes] == ["traced", "untraced", "smallest"]
    assert not list(made.rglob("*.inductor")) and not (made / ".partial").exists()
    axes = {"batch": (1, 9, 1), "tokens": (2, 160, 2)}
    spec = {**artifact.spec, "instructions": tuple(artifact.spec["instructions"]), "axes": axes}
    assert built_of(package_of(made)) == Built(**spec)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (7, 14), (9, 126), (2, 154), (1, 160)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_agrees_with_eager_at_sizes_that_no_gate_saw(made: Path, precision: str, batch: int, tokens: int) -> None:
    loaded = optimize.load(made, trust_remote_code=True)["model"]
    component = recorded_component(loaded.bundle, "model")
    sizes = {"batch": batch, "tokens": tokens}
    feeds = feeds_for(component.inputs, sizes, precision, seed=5)
    exact = feeds_for(component.inputs, sizes, "fp32", seed=5) | {"x": feeds["x"].float()}
    with loaded.runner("aoti", precision) as ours, loaded.runner("eager", "fp32") as eager:
        got, expected = ours.infer(feeds), eager.infer(exact)
    limit = {"fp32": 1e-5, "fp16": 5e-3}[precision]
    for name in ("y", "square"):
        assert got[name].shape == expected[name].shape and got[name].dtype == feeds["x"].dtype
        assert float((got[name].float() - expected[name]).norm() / expected[name].norm()) < limit


def test_a_bound_run_can_be_repeated_and_feeds_stay(made: Path) -> None:
    loaded = optimize.load(made)["model"]
    component = recorded_component(loaded.bundle, "model")
    feeds, others = (feeds_for(component.inputs, {"batch": 3, "tokens": 14}, "fp32", seed) for seed in (1, 2))
    kept = {n: t.clone() for n, t in feeds.items()}
    with loaded.runner("aoti", "fp32") as runner:
        run, another = runner.bind(feeds), runner.bind(others)
        first = run()
        before = {n: t.clone() for n, t in first.items()}
        assert not torch.equal(another()["y"], first["y"])
        assert all(torch.equal(run()[n], t) and torch.equal(first[n], t) for n, t in before.items())
    assert all(torch.equal(feeds[n], t) for n, t in kept.items())


def test_threads_are_those_of_who_runs_it(made: Path) -> None:
    """Inductor's default compiles the number of threads in, and of a process with one thread no loop is parallel."""
    with zipfile.ZipFile(package_of(made)) as file:
        code = next(file.read(n).decode() for n in file.namelist() if n.endswith(".kernel.cpp"))
    assert "#pragma omp parallel" in code and "num_threads(" not in code


# --- what is kept, and what is made anew -----------------------------------------------------------------------------


def plan(folder: Path, **words: Any) -> Mapping[str, tuple[bool, str]]:
    found = optimize.export(SOURCE, folder, dry_run=True, **{"formats": ["aoti"], **words})
    return {s.artifact: (s.hit, s.why) for s in found.steps}


def test_a_second_export_keeps_it(made: Path) -> None:
    path = package_of(made)
    before = path.stat().st_mtime_ns
    assert plan(made) == {"model/fp32/aoti": (True, "unchanged")}
    assert set(plan(made, formats=["onnx", "aoti"])) == {"model/fp32", "model/fp32/aoti"}
    optimize.export(SOURCE, made, formats=["aoti"])
    assert path.stat().st_mtime_ns == before


def test_other_axes_machines_and_files_make_it_anew(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(copied, axes=["batch=2"])["model/fp32/aoti"] == (False, "changed: axes")
    assert plan(copied, precisions=["bf16"])["model/bf16/aoti"] == (False, "new")
    path = package_of(copied)
    path.write_bytes(path.read_bytes()[:-1])
    assert plan(copied)["model/fp32/aoti"] == (False, "file missing or changed: model/fp32/aoti")
    here = torch.cpu.get_capabilities()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: here | {"avx99": True})
    assert plan(copied, precisions=["fp16"])["model/fp16/aoti"] == (False, "changed: instructions")


def test_the_command_says_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", SOURCE, "--out", str(made), "--format", "aoti", "--json", "--why"]) == 0
    said = capsys.readouterr()
    rows = {row["artifact"]: row for row in json.loads(said.out)}
    assert set(rows) == {"model/fp32", "model/fp32/aoti", "model/fp16/aoti"} and "unchanged" in said.err
    assert (
        rows["model/fp32/aoti"]["file"] == "model/model.fp32.aoti.pt2" and "whole" in rows["model/fp32/aoti"]["parity"]
    )
    assert main(["inspect", str(made), "--json"]) == 0
    found = {a["id"]: a for a in json.loads(capsys.readouterr().out)["artifacts"]}
    assert found["model/fp16/aoti"]["kind"] == "aoti" and found["model/fp16/aoti"]["parity"] < 1e-2
    assert built_of(package_of(made)).isa in found["model/fp32/aoti"]["target"]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_changed_file_is_not_loaded(copied: Path) -> None:
    """A package is native code: its digest is looked at before any of it runs."""
    path = package_of(copied)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(GateError, match="is not the file that was proved"):
        optimize.load(copied)["model"].runner("aoti", "fp32")
    found = {v.artifact: v for v in verify(copied, trust_remote_code=True)}
    assert found["model/fp32/aoti"].state == "failed" and found["model/fp16/aoti"].state == "passed"


def relabelled(path: Path, target: Path, change: Callable[[Built], Built]) -> Path:
    """The same package, which says that it was compiled for something else."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("_metadata.json"):
                content = json.dumps({"optimize": json.dumps(asdict(change(built_of(path))))}).encode()
            new.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: replace(b, instructions=(*b.instructions, "avx99")), "a processor without avx99"),
        (lambda b: replace(b, machine="aarch99"), "expected: aarch99"),
        (lambda b: replace(b, torch="1.13.1"), "expected: torch 1.13"),
        (lambda b: replace(b, sm=1), "SM1"),
    ],
)
def test_one_for_another_machine_is_not_loaded(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Built], Built], words: str
) -> None:
    import torch._inductor

    component = recorded_component(Bundle.read(made), "model")
    path = relabelled(package_of(made), tmp_path / "other.pt2", change)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_: pytest.fail("its code was loaded"))
    with pytest.raises(MissingError, match=words) as refused, AotiRunner(path, component):
        pass
    assert "compiled for another machine" in str(refused.value) and "--format aoti" in str(refused.value)


def test_a_processor_that_lacks_an_instruction_refuses_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = dict(torch.cpu.get_capabilities())
    lost = built_of(package_of(made)).instructions[0]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: here | {lost: False})
    with (
        pytest.raises(MissingError, match=f"a processor without {lost}"),
        optimize.load(made)["model"].runner("aoti", "fp32"),
    ):
        pass
    found = {v.artifact: v for v in verify(made, trust_remote_code=True)}
    assert found["model/fp32/aoti"].state == "skipped" and lost in found["model/fp32/aoti"].detail
    assert found["model/fp32"].state == "passed"


def test_what_is_no_package_is_refused(made: Path, tmp_path: Path) -> None:
    bundle = Bundle.read(made)
    graph, foreign = bundle.path(bundle.manifest.artifacts["model/fp32"]), tmp_path / "foreign.pt2"
    with zipfile.ZipFile(foreign, "w") as file:
        file.writestr("model/data/aotinductor/model/x.wrapper_metadata.json", '{"AOTI_DEVICE_KEY": "cpu"}')
    for path in (graph, foreign, tmp_path / "absent.pt2"):
        with pytest.raises(InputError, match="no AOTInductor package of ours"):
            built_of(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(10, 4, 12), "ids": torch.zeros(10, 4, dtype=torch.int64)}, "leave the axis batch"),
        ({"x": torch.zeros(1, 81, 12), "ids": torch.zeros(1, 81, dtype=torch.int64)}, "leave the axis tokens"),
        ({"ids": torch.zeros(2, 5, dtype=torch.int64)}, "the input ids does not fit"),
        ({"x": torch.zeros(2, 4, 13)}, "the input x does not fit"),
        ({"x": torch.zeros(2, 4)}, "the input x does not fit"),
        ({"z": torch.zeros(1)}, "do not fit the component"),
    ],
)
def test_feeds_that_the_code_was_not_made_for_are_refused(made: Path, change: Any, words: str) -> None:
    """The code itself looks at no size: what does not fit would be read past its end."""
    loaded = optimize.load(made)["model"]
    feeds = feeds_for(recorded_component(loaded.bundle, "model").inputs, {"batch": 2, "tokens": 8}, "fp32")
    with loaded.runner("aoti", "fp32") as runner, pytest.raises(InputError, match=words):
        runner.infer({**feeds, **change})


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--format", "aoti", "--precision", "int8"], 2, "has no quantized form"),
        (["--format", "aoti", "--format", "onnx", "--precision", "int8"], 2, "has no quantized form"),
        (["--format", "aoti", "--precision", "fp16", "--keep-fp32", "out"], 2, "in one precision throughout"),
        (["--format", "onnx", "--device", "cpu"], 2, "--device is for AOTInductor packages"),
        (["--format", "aoti", "--device", "tpu"], 2, "unknown device tpu"),
        (["--format", "aotinductor"], 2, "unknown format aotinductor"),
        (["--format", "aoti", "--memory", "1kB"], 3, "not enough memory to compile"),
    ],
)
def test_words_that_do_not_go_together(
    words: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", SOURCE, "--out", str(tmp_path / "b"), *words]) == code
    assert said in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_without_a_compiler_it_says_so_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimize.compile.backends.shutil.which", lambda _: None)
    with pytest.raises(MissingError, match=r"needs a C\+\+ compiler"):
        plan(tmp_path / "b")


def test_an_axis_that_cannot_vary_is_named(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="could not be exported") as refused:
        optimize.export(f"python:{NAME}:fixed", tmp_path / "b", formats=["aoti"])
    assert "batch_" in str(refused.value) and "make that axis static (--axis NAME=SIZE)" in str(refused.value)
    assert not (tmp_path / "b").exists()


# --- proof -----------------------------------------------------------------------------------------------------------


def test_verify_proves_it_again_where_native_code_may_run(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import aoti_factories  # type: ignore[import-not-found]

    found = {v.artifact: v for v in verify(copied, trust_remote_code=True)}
    assert found["model/fp32/aoti"].state == "passed" and "parity" in found["model/fp32/aoti"].detail
    monkeypatch.setattr(aoti_factories, "SEED", 1)
    found = {v.artifact: v for v in verify(copied, trust_remote_code=True)}
    assert found["model/fp32/aoti"].state == "failed" and "weights are not those" in found["model/fp32/aoti"].detail


def test_verify_runs_no_native_code_that_nobody_trusts(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.read(copied)
    text = (copied / "manifest.json").read_text()
    packages = {i: a for i, a in json.loads(text)["artifacts"].items() if a["kind"] == "aoti"}
    (copied / "manifest.json").write_text(json.dumps({**json.loads(text), "artifacts": packages}))
    monkeypatch.setattr(AotiRunner, "__enter__", lambda _: pytest.fail("its code was loaded"))
    assert {v.state for v in verify(copied)} == {"skipped"}
    path = bundle.path(bundle.manifest.artifacts["model/fp32/aoti"])
    path.write_bytes(path.read_bytes() + b"x")
    assert {v.artifact: v.state for v in verify(copied)} == {"model/fp32/aoti": "failed", "model/fp16/aoti": "skipped"}


def test_a_package_that_computes_something_else_does_not_pass(made: Path, tmp_path: Path) -> None:
    """The gate compares with eager of the source: here the source's weights are others than those compiled in."""
    import aoti_factories

    from optimize.gate import plan_for
    from optimize.packaging import miss, parity_of_package

    component = component_of(Bundle.read(made), "model", trust_remote_code=True)
    aoti_factories.SEED = 1
    try:
        other = component_of(Bundle.read(made), "model", trust_remote_code=True)
    finally:
        aoti_factories.SEED = 0
    path = Path(shutil.copy(package_of(made), tmp_path))
    say: Callable[[str], None] = [].append
    assert parity_of_package(path, component, "fp32", "cpu", plan_for(component), say).passed
    result = parity_of_package(path, other, "fp32", "cpu", plan_for(other), say)
    assert not result.passed
    error = miss(path, other, "fp32", result, tmp_path / "b", "model.fp32.aoti")
    assert "parity missed: model fp32 as a package" in str(error) and "1e-04" in str(error).replace("0.0001", "1e-04")
    assert (tmp_path / "b" / FAILED / "model.fp32.aoti" / path.name).is_file() and not path.exists()


# --- a transformer, our operators ------------------------------------------------------------------------------------

ALONE = """
import sys
from pathlib import Path
import optimize
from optimize.compile.feeds import feeds_for
from optimize.loading import recorded_component
loaded = optimize.load(sys.argv[1])["llama"]
component = recorded_component(loaded.bundle, "llama")
with loaded.runner("aoti", "bf16") as runner:
    for batch, tokens, past in ((1, 1, 63), (3, 7, 0), (2, 63, 1)):
        sizes = {"batch": batch, "tokens": tokens, "past": past}
        out = runner.infer(feeds_for(component.inputs, sizes, "bf16"))
        print(*[list(t.shape) for t in out.values()][:1], all(bool(t.isfinite().all()) for t in out.values()))
"""


def test_our_operators_are_there_before_the_code_is(tmp_path: Path) -> None:
    """A decoder with a past of none and of 63, in bf16, fused; run in a process that has loaded nothing before."""
    bundle = optimize.export("arch:llama@tiny", tmp_path / "b", formats=["aoti"], precisions=["bf16"], kernels=True)
    (artifact,) = bundle.artifacts()
    assert artifact.id == "llama/bf16/aoti/kernels" and artifact.spec["fusions"]
    assert artifact.parity is not None and artifact.parity.passed and "eager bf16's own" in artifact.parity.rule
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.startswith(f"[{b}, {t},") for line, (b, t) in zip(lines, ((1, 1), (3, 7), (2, 63)), strict=True)]
    assert all(line.endswith("True") for line in lines)


@needs_gpu
def test_a_package_for_a_gpu(tmp_path: Path) -> None:
    bundle = optimize.export(SOURCE, tmp_path / "b", formats=["aoti"], precisions=["fp32", "fp16"], device="cuda")
    major, minor = torch.cuda.get_device_capability()
    assert {a.id for a in bundle.artifacts()} == {f"model/{p}/aoti-sm{major}{minor}" for p in ("fp32", "fp16")}
    assert all(a.parity is not None and a.parity.passed for a in bundle.artifacts())
