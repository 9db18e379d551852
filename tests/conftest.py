"""What several test files share."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor


# pytest-xdist's workers share the cores with each other: torch with more threads waits for one at every barrier
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONG = ("test_support.py", "test_interpreted.py", "test_emitters.py")
"""Files that take minutes: they begin first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-support", action="store_true", help="write SUPPORT.md anew")
    parser.addoption("--all-precisions", action="store_true", help="fp16 and bf16 of every architecture, too")


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo pipeline exported once: all components in fp32, the text encoder in fp16 too. Read it, do not write.

    (Proving the U-Net and the VAE in fp16 takes a CPU half a minute each.) Workers of pytest-xdist share it.
    """
    import optimize

    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (root / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second finds every artifact there
        optimize.export("demo", root / "demo")
        optimize.export("demo", root / "demo", components=["text_encoder"], precisions=["fp16"])
    return root / "demo"


@pytest.fixture
def on_the_device() -> Iterator[None]:
    """New tensors are on the GPU, where there is one and Triton does not interpret: the same tests prove the kernels
    there (`make gpu`)."""
    import torch

    from optimize.kernels.select import interpreting

    with torch.device("cpu" if interpreting() or not torch.cuda.is_available() else "cuda"):
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are full of NaN, so that what a kernel does not write is seen."""
    import torch

    def poison(make: Callable[..., "Tensor"]) -> Callable[..., "Tensor"]:
        def made(*args: Any, **options: Any) -> "Tensor":
            t = make(*args, **options)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def within_budget() -> Callable[["Tensor", "Tensor", "Tensor"], None]:
    """Asserts that ours is at most twice as far from the truth (float64) as torch's own result in the same type, or as
    values that are off by half a unit in the last place. Both distances are L2 norms."""
    import torch

    def check(ours: "Tensor", theirs: "Tensor", truth: "Tensor") -> None:
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == truth.shape
        assert truth.dtype == torch.float64 and ours.data_ptr() != theirs.data_ptr()
        error, own = ((t.double() - truth).norm().item() for t in (ours, theirs))
        half_a_unit = torch.finfo(ours.dtype).eps / 2 * truth.norm().item()
        assert error <= 2 * max(own, half_a_unit), f"error {error:.3e}, torch's own {own:.3e}, units {half_a_unit:.3e}"

    return check


@pytest.fixture(scope="session")
def native_build() -> Callable[..., Path]:
    """`native_build(folder, target, *options)` builds a target of tests/native in build/folder, which later runs find
    again, and returns it."""
    root = Path(__file__).parent.parent
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("needs cmake and ninja")

    def build(folder: str, target: str, *options: str) -> Path:
        where = root / "build" / folder
        where.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", str(root), "-B", str(where), "-G", "Ninja", "-DOPTIMIZE_TESTS=ON", *options]
        with (where / "lock").open("w") as lock:  # workers of pytest-xdist share the folder
            fcntl.flock(lock, fcntl.LOCK_EX)
            for command in (configure, ["cmake", "--build", str(where), "--target", target]):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return where / "tests" / "native" / target

    return build
