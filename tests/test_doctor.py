import subprocess
import sys
import time
from importlib import metadata
from types import SimpleNamespace

import pytest

from optimize.compile.tensorrt import Flavour
from optimize.errors import MissingError
from optimize.tools import doctor as module
from optimize.tools.doctor import Check, doctor

PACKAGES = "torch gpu triton onnx onnxruntime tensorrt tensorrt_rtx diffusers transformers optimum netron"


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The only distributions that seem to be installed, by version."""
    installed: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    return installed


def test_every_check_answers_and_each_failure_says_how_to_mend_it() -> None:
    checks = doctor()
    rest = ["chromium", "disk", "memory"]
    assert [check.name for check in checks if check.name != "native library"] == ["python", *PACKAGES.split(), *rest]
    assert next(check.ok for check in checks if check.name == "native library")  # the package's build made it
    assert all(check.detail for check in checks)
    assert all(check.mend for check in checks if not check.ok)
    assert all(check.mend is None for check in checks if check.ok)


def test_it_is_fast_and_imports_no_torch() -> None:
    code = "import sys; from optimize.tools.doctor import doctor; doctor(); print({'torch', 'onnx'} & set(sys.modules))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert time.perf_counter() - start < 10


def test_nothing_installed_is_no_crash(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr("optimize.compile.tensorrt.find_spec", lambda name: None)
    found = {check.name: check for check in doctor()}
    for name in ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "diffusers", "netron"):
        assert found[name].detail == "not installed" and "pip install" in (found[name].mend or "")
    assert found["python"].ok


def test_an_old_package_is_found_by_our_own_requirements(versions: dict[str, str]) -> None:
    versions.update({"optimize": "0.1.0", "torch": "1.13.1"})
    check = module.package("torch")
    assert not check.ok and check.detail.startswith("1.13.1, but >=")
    assert check.mend == f'pip install "torch{check.detail.split("but ")[1].removesuffix(" is needed")}"'
    versions["torch"] = "99.0+cpu"
    assert module.package("torch") == Check("torch", True, "99.0+cpu")


def test_two_onnxruntimes_are_a_fault(versions: dict[str, str]) -> None:
    versions.update({"onnxruntime": "1.31.0", "onnxruntime-gpu": "1.31.0"})
    check = module.onnxruntime()
    assert not check.ok and "both installed" in check.detail
    assert check.mend is not None and "pip uninstall onnxruntime onnxruntime-gpu" in check.mend


@pytest.mark.parametrize("fault", [ImportError("libcudart.so.12"), OSError("libcudart.so.12")])
def test_a_broken_onnxruntime_says_why(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def broken(name: str) -> None:
        raise fault

    versions["onnxruntime"] = "1.31.0"
    monkeypatch.setattr(module, "import_module", broken)
    assert module.onnxruntime().detail == "onnxruntime 1.31.0 cannot be imported: libcudart.so.12"


def test_the_providers_of_onnxruntime_are_named(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(module, "import_module", lambda name: SimpleNamespace(get_available_providers=lambda: names))
    versions["onnxruntime-gpu"] = "1.31.0"
    assert module.onnxruntime() == Check("onnxruntime", True, "onnxruntime-gpu 1.31.0, built with CUDA, CPU")


def test_the_gpu_is_named_and_a_torch_without_cuda_is_said(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "current_gpu", lambda: ("NVIDIA L4", 89))
    versions["torch"] = "2.13.0+cu130"
    assert module.gpu() == Check("gpu", True, "NVIDIA L4, sm89")
    versions["torch"] = "2.13.0+cpu"
    assert module.gpu().detail == "NVIDIA L4, sm89, but torch 2.13.0+cpu has no CUDA"

    def no_driver() -> tuple[str, int]:
        raise MissingError("no NVIDIA driver here", got="libcuda.so.1: cannot open")

    monkeypatch.setattr(module, "current_gpu", no_driver)
    assert "no NVIDIA driver here: libcuda.so.1: cannot open" in module.gpu().detail


def test_tensorrt_says_what_it_builds_for_or_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Flavour("tensorrt", "11.0", (), "no NVIDIA driver here"), Flavour("tensorrt_rtx", "1.7", (75, 89))]
    monkeypatch.setattr(module, "flavours", lambda: both)
    assert module.tensorrt().detail == "11.0 no NVIDIA driver here"
    assert module.tensorrt_rtx() == Check("tensorrt_rtx", True, "1.7: builds for sm75, sm89")


def test_little_room_is_said_with_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**30))
    monkeypatch.setattr(module, "_available_memory_gib", lambda: 2.5)
    assert module.disk().detail == "3.0 GiB free" and "10 GiB" in (module.disk().mend or "")
    assert module.memory().detail == "2.5 GiB free" and not module.memory().ok
    monkeypatch.setattr(module, "_available_memory_gib", lambda: None)
    assert module.memory().ok


def test_a_chromium_is_looked_for_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: "/opt/chrome" if name == "google-chrome" else None)
    assert module.chromium() == Check("chromium", True, "/opt/chrome")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module.chromium() == Check("chromium", False, "not found", "apt-get install chromium")
