"""Triton's interpreter cannot share a process with ahead-of-time compiling: each file of it runs in one of its own."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_in_the_interpreter(path: Path, tmp_path: Path) -> None:
    """Every test of the file runs and passes; none is skipped. Its failures stand in this one's message."""
    pytest.importorskip("triton", reason="needs triton")
    report = tmp_path / "report.xml"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", path, f"--junitxml={report}", "--tb=short", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        cwd=path.parent.parent,
        text=True,
        capture_output=True,
        check=False,
    )
    assert report.exists(), run.stdout + run.stderr
    suite = ElementTree.parse(report).getroot()[0].attrib
    counts = {word: int(suite[word]) for word in ("tests", "failures", "errors", "skipped")}
    assert run.returncode == 0 and counts["failures"] == counts["errors"] == 0, run.stdout[-12000:]
    assert counts["tests"] > 0, f"{path.name} has no tests"
    assert counts["skipped"] == 0, run.stdout[-3000:]


def test_there_are_files_to_interpret() -> None:
    assert FILES
