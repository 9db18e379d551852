"""What CMake builds beside the library: a C program that deploys it without Python; the kernels under sanitizers."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from optimize.kernels import native_cubins, native_library, ort_library, reference

ROOT = Path(__file__).parent.parent


Build = Callable[..., Path]


def runtime() -> Path:
    """ONNX Runtime's own library: in the wheel, plain or inside its Python module."""
    folder = Path(ort.__file__).parent / "capi"
    found = sorted(folder.glob("libonnxruntime.so*")) or sorted(folder.glob("onnxruntime_pybind11_state*.so"))
    if not found:
        pytest.skip("needs a wheel of ONNX Runtime with a shared library for Linux")
    return found[0]


def attention_model(path: Path, dtype: int) -> None:
    """One node, written by hand: no exporter takes part."""
    node = helper.make_node("Attention", ["i0", "i1", "i2"], ["o0"], domain="ai.optimize", causal=1, scale=0.125)
    inputs = [helper.make_tensor_value_info(n, dtype, [1, "heads", f"t{n}", 64]) for n in ("i0", "i1", "i2")]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("o0", dtype, None)])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ai.optimize", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_c_program_runs_the_library(tmp_path: Path, native_build: Build, dtype: torch.dtype) -> None:
    program = native_build("tests-native", "deploy")
    attention_model(tmp_path / "m.onnx", TensorProto.FLOAT if dtype == torch.float32 else TensorProto.FLOAT16)
    q, k, v = torch.randn(1, 4, 63, 64), torch.randn(1, 2, 77, 64), torch.randn(1, 2, 77, 64)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    words = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        x.numpy().tofile(tmp_path / name)
        kind = "float" if dtype == torch.float32 else "half"
        words.append(f"{kind}:{','.join(map(str, x.shape))}:{tmp_path / name}")
    command = [str(program), str(runtime()), str(ort_library()), str(tmp_path / "m.onnx"), str(tmp_path / "out"), "2"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, env={})
    assert done.returncode == 0, done.stderr
    assert f"ONNX Runtime {ort.__version__}" in done.stdout
    assert "3 inputs, 1 outputs\no0: 16128 elements, [1, 4, 63, 64]" in done.stdout
    got = torch.from_numpy(np.fromfile(tmp_path / "out", dtype=q.numpy().dtype)).reshape(q.shape)
    truth = reference.attention(q.double(), k.double(), v.double(), None, True, 0.125)
    assert (got - truth).norm() / truth.norm() < (1e-6 if dtype == torch.float32 else 1e-3)


def test_the_c_program_says_what_is_wrong(tmp_path: Path, native_build: Build) -> None:
    """A shape that does not fit comes back as an error with our words, through the C ABI."""
    program = native_build("tests-native", "deploy")
    attention_model(tmp_path / "m.onnx", TensorProto.FLOAT)
    torch.zeros(1, 2, 7, 64).numpy().tofile(tmp_path / "x")
    torch.zeros(1, 3, 7, 64).numpy().tofile(tmp_path / "y")
    words = [f"float:1,2,7,64:{tmp_path / 'x'}", *[f"float:1,3,7,64:{tmp_path / 'y'}"] * 2]
    command = [str(program), str(runtime()), str(ort_library()), str(tmp_path / "m.onnx"), str(tmp_path / "out"), "1"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ai.optimize Attention: k: got 3 heads, expected a number that divides the 2 heads of q" in done.stderr


def test_the_kernels_under_sanitizers(native_build: Build) -> None:
    """Address- and UndefinedBehaviorSanitizer, every instruction set of this CPU, tensors of exactly their size."""
    driver = native_build("tests-sanitized", "driver", "-DOPTIMIZE_SANITIZE=ON")
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run([str(driver)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.startswith("base") and done.stdout.endswith("passed\n")


def test_the_wheel_carries_the_library(tmp_path: Path) -> None:
    """For this platform, any Python 3; without the sources; with the Triton kernels that its build has compiled."""
    triton = importlib.util.find_spec("triton") is not None
    command = ["pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)]
    options = [f"build-dir={tmp_path / 'build'}", "cmake.define.OPTIMIZE_CUBINS=AUTO"]
    options += ["cmake.define.OPTIMIZE_CUBINS_OPTIONS=--kernel;gated;--sm;90"]
    command += [f"--config-settings={option}" for option in options]  # pip's short -C is from 23.1
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if "No matching distribution" in done.stderr or "Could not find a version" in done.stderr:
        pytest.skip("needs a package index for the build's own requirements")
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("optimize-") and "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "optimize/kernels/optimize_ort.so" in names and "optimize/kernels/native_library.py" in names
    assert not [n for n in names if "/native/" in n]
    library = zipfile.ZipFile(wheel).extract("optimize/kernels/optimize_ort.so", tmp_path)
    gated = [form for form in native_cubins.forms() if form.kernel == "gated"] if triton else []
    assert native_library.cubins(Path(library)) == len(gated)


def configured(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_the_build_says_what_the_cubins_lack(tmp_path: Path) -> None:
    done = configured(tmp_path / "a", f"-DOPTIMIZE_CUBINS={tmp_path / 'empty'}")
    assert done.returncode != 0 and "no cubins.inc in" in done.stderr
    bare = tmp_path / "venv"
    venv.create(bare, symlinks=True)
    words = [f"-DOPTIMIZE_PYTHON={bare / 'bin' / 'python'}", "-DOPTIMIZE_CUBINS=ON"]
    done = configured(tmp_path / "b", *words)
    assert done.returncode != 0 and "has no torch, triton" in " ".join(done.stderr.split())
    done = configured(tmp_path / "b", words[0], "-DOPTIMIZE_CUBINS=AUTO")
    assert done.returncode == 0 and "OPTIMIZE_CUBINS: none" in done.stdout
