"""The house: which room may import which, what is public, and that nothing heavy is needed to look around."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import optimize

ROOT = Path(optimize.__file__).parent
ROOMS = ("kernels", "compile", "quantize", "profiles", "tools")
HEAVY = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "diffusers",
    "transformers",
    "triton",
    "tensorrt",
    "tensorrt_rtx",
    "accelerate",
    "optimum",
    "polygraphy",
    "safetensors",
    "netron",
    "sklearn",
)
ALLOWED = {
    "kernels": set(),
    "compile": {"kernels"},
    "quantize": {"kernels", "compile"},
    "profiles": {"kernels", "compile", "quantize"},
    "front door": {"kernels", "compile", "quantize", "profiles"},
    "tools": {"kernels", "compile", "quantize", "profiles", "front door"},
}
GROUND = {"errors", "progress"}  # what every room stands on
LAZY_DOOR = {"tools"}  # the front door names `optimize.inspect`, which lives in tools, and loads it when asked


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0] if path.parent != ROOT else "front door"


def imports_of(path: Path) -> set[str]:
    """Rooms that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        if isinstance(node, ast.ImportFrom) and node.level > 1:
            names = [f"optimize.{node.module or node.names[0].name}"]
        for name in names:
            parts = name.split(".")
            if parts[0] != "optimize" or len(parts) == 1:
                continue
            found.add(parts[1] if parts[1] in ROOMS else "ground" if parts[1] in GROUND else "front door")
    return found - {"ground"}


def sources() -> list[Path]:
    return sorted(p for room in (*(ROOT / r for r in ROOMS), ROOT) for p in room.glob("*.py"))


def test_rooms_import_one_way() -> None:
    wrong = []
    for path in sources():
        room = room_of(path)
        allowed = ALLOWED[room] | {room} | (LAZY_DOOR if path.name == "__init__.py" and room == "front door" else set())
        wrong += [f"{room}/{path.name} imports {other}" for other in imports_of(path) - allowed]
    assert not wrong


def test_public_names_are_these_and_exist() -> None:
    assert optimize.__all__ == [
        "Axis",
        "Bundle",
        "Component",
        "GateError",
        "InputError",
        "InternalError",
        "MissingError",
        "OptimizeError",
        "TensorSpec",
        "build",
        "evaluate",
        "export",
        "inspect",
        "load",
        "profile",
        "quantize",
        "record",
        "verify",
        "watch",
    ]
    for name in optimize.__all__:
        assert getattr(optimize, name).__doc__, name


BLOCK = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"  # a module that is None cannot be imported


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, check=False)


LIGHT = [
    "optimize",
    "optimize.errors",
    "optimize.progress",
    "optimize.exporting",
    "optimize.making",
    "optimize.loading",
    "optimize.recording",
    "optimize.quantizing",
    "optimize.evaluating",
    "optimize.profiling",
    "optimize.candidates",
    "optimize.measuring",
    "optimize.answering",
    "optimize.seats",
    "optimize.callables",
    "optimize.compile.backends",
    "optimize.profiles.schema",
    "optimize.compile",
    "optimize.compile.spec",
    "optimize.compile.adapters",
    "optimize.compile.architectures",
    "optimize.compile.bundle",
    "optimize.compile.records",
    "optimize.compile.weights",
    "optimize.compile.digests",
    "optimize.compile.tensorrt",
    "optimize.kernels",
    "optimize.quantize",
    "optimize.profiles",
    "optimize.profiles.targets",
    "optimize.tools",
    "optimize.tools.cli",
    "optimize.tools.doctor",
    "optimize.tools.tables",
    "optimize.tools.inspecting",
    "optimize.tools.netron",
    "optimize.tools.demo",
]


@pytest.mark.parametrize("module", LIGHT)
def test_imports_with_the_heavy_packages_blocked(module: str) -> None:
    done = run_blocked(f"import {module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "verb", ["", "export", "build", "verify", "evaluate", "record", "inspect", "targets", "doctor"]
)
def test_help_answers_with_the_heavy_packages_blocked(verb: str) -> None:
    done = run_blocked(f"from optimize.tools.cli import main; main({[v for v in (verb, '--help') if v]!r})")
    assert done.returncode == 0, done.stderr
    assert "usage: optimize" in done.stdout


@pytest.mark.parametrize("verb", ["targets", "doctor"])
def test_looking_around_works_with_the_heavy_packages_blocked(verb: str) -> None:
    done = run_blocked(f"import sys; from optimize.tools.cli import main; sys.exit(main([{verb!r}, '--json']))")
    assert done.returncode == 0, done.stderr


def test_every_module_imports() -> None:
    """The heavy ones too, each in a fresh interpreter where nothing else has been imported."""
    names = [
        f"optimize.{room_of(p)}.{p.stem}" if room_of(p) != "front door" else f"optimize.{p.stem}"
        for p in sources()
        if p.stem != "__init__"
    ]
    code = "import importlib, sys\nfor n in sys.argv[1:]: importlib.import_module(n)"
    for first in names[:: max(1, len(names) // 3)]:
        done = subprocess.run([sys.executable, "-c", code, first, *names], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
