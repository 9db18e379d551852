"""What several test files share."""

import fcntl
import os
from pathlib import Path

import pytest


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
