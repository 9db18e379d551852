"""optimize: U-Nets, DiTs, VAEs and transformers become ONNX and TensorRT artifacts that are proved right.

Every verb of the command line is a function here with the same words. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from optimize.compile.bundle import Bundle
    from optimize.compile.spec import Axis, Component, TensorSpec
    from optimize.errors import GateError, InputError, InternalError, MissingError, OptimizeError
    from optimize.evaluating import evaluate
    from optimize.exporting import export
    from optimize.loading import build, load, verify
    from optimize.profiles.watching import watch
    from optimize.profiling import profile
    from optimize.quantizing import quantize
    from optimize.recording import record
    from optimize.tools.inspecting import inspect

_WHERE = {
    "export": "exporting",
    "load": "loading",
    "verify": "loading",
    "build": "loading",
    "evaluate": "evaluating",
    "profile": "profiling",
    "quantize": "quantizing",
    "record": "recording",
    "watch": "profiles.watching",
    "inspect": "tools.inspecting",
    "Component": "compile.spec",
    "Axis": "compile.spec",
    "TensorSpec": "compile.spec",
    "Bundle": "compile.bundle",
    "OptimizeError": "errors",
    "InputError": "errors",
    "GateError": "errors",
    "MissingError": "errors",
    "InternalError": "errors",
}

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'optimize' has no attribute {name!r}")
    return getattr(import_module(f"optimize.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
