"""What can run a component, in one table: what each backend takes, where it runs, and why it is not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from optimize.errors import InputError, MissingError

from .spec import PRECISIONS

if TYPE_CHECKING:
    from .runners import Runner
    from .spec import Component

Takes = Literal["module", "onnx", "aoti", "engine"]


@dataclass(frozen=True)
class Subject:
    """What a backend is to run: a component in a precision, by the file at `path` where the backend takes one.

    `device` is "cpu" or "cuda"; `threads` of a CPU (0: all); `flavour` the TensorRT that built an engine; `entries`
    are ONNX Runtime's session options."""

    component: Component
    precision: str
    path: Path | None = None
    device: str = "cpu"
    threads: int = 0
    flavour: str = "tensorrt"
    entries: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Backend:
    """`takes` says what it runs; `default` that it is measured where none is named; `missing(device)` gives why it is
    not there, or nothing; `compiles` that its first run at new sizes compiles."""

    name: str
    what: str
    takes: Takes
    devices: tuple[str, ...]
    make: Callable[[Subject], Runner]
    missing: Callable[[str], str]
    default: bool = True
    compiles: bool = False

    def why_not(self, device: str) -> str:
        """Why it cannot run on this device of this machine; nothing where it can."""
        if device not in self.devices:
            return f"{self.name} does not run on {device}"
        return self.missing(device)


def torch_missing(device: str, compiled: bool = False, kernels: bool = False) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if kernels and device == "cuda" and find_spec("triton") is None:
        return "our kernels need triton"
    if compiled and device == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "torch.compile for a CPU needs a C++ compiler (g++)"
    if compiled and device == "cuda" and find_spec("triton") is None:
        return "torch.compile for a GPU needs triton"
    return ""


def onnxruntime_missing(device: str, provider: str = "CPUExecutionProvider") -> str:
    if find_spec("onnxruntime") is None:
        return "onnxruntime is not installed"
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {provider}"
    return torch_missing(device)


def tensorrt_missing(device: str) -> str:
    from .tensorrt import flavours

    if not any(find_spec(f.module) for f in flavours()):
        return "neither tensorrt nor tensorrt-rtx is installed"
    return torch_missing(device)


def eager(subject: Subject, kernels: bool = False) -> Runner:
    from .runners import EagerRunner

    return EagerRunner(subject.component, subject.precision, device=subject.device, kernels=kernels)


def compiled(subject: Subject, style: str, kernels: bool = False) -> Runner:
    from .compiled import CompiledRunner

    return CompiledRunner(subject.component, subject.precision, style, device=subject.device, kernels=kernels)


def packaged(subject: Subject) -> Runner:
    from .aoti import AotiRunner

    assert subject.path is not None
    return AotiRunner(subject.path, subject.component, device=subject.device)


def onnxruntime(subject: Subject, provider: str = "CPUExecutionProvider") -> Runner:
    from .runners import OnnxRuntimeRunner

    assert subject.path is not None
    entries = dict(subject.entries or {})
    return OnnxRuntimeRunner(subject.path, provider, threads=subject.threads, entries=entries)


def engine(subject: Subject, graphs: bool = False) -> Runner:
    from .engine_runner import EngineRunner

    assert subject.path is not None
    return EngineRunner(subject.path, subject.flavour, graphs=graphs)


def of_torch(style: str, what: str, devices: tuple[str, ...] = ("cpu", "cuda"), default: bool = False) -> Backend:
    missing = partial(torch_missing, compiled=True)
    return Backend(style, what, "module", devices, partial(compiled, style=style), missing, default, compiles=True)


def of_kernels(name: str, what: str, make: Callable[..., Runner], style: str = "") -> Backend:
    words = {"style": style} if style else {}
    missing = partial(torch_missing, compiled=bool(style), kernels=True)
    made = partial(make, kernels=True, **words)
    return Backend(name, what, "module", ("cpu", "cuda"), made, missing, default=False, compiles=bool(style))


def of_provider(name: str, what: str, provider: str) -> Backend:
    make, missing = partial(onnxruntime, provider=provider), partial(onnxruntime_missing, provider=provider)
    return Backend(name, what, "onnx", ("cuda",), make, missing)


_ROWS = (
    Backend("eager", "torch as it is", "module", ("cpu", "cuda"), eager, torch_missing),
    of_torch("torch.compile", "the whole network, default mode", default=True),
    of_torch("torch.compile-max-autotune", "the same, kernels chosen by timing them"),
    of_torch("torch.compile-regional", "each repeated block alone: compiles faster"),
    of_torch("torch.compile-cudagraphs", "the whole network as a CUDA graph", ("cuda",)),
    of_kernels("fused", "torch with our kernels in it (`kernels.fuse`)", eager),
    of_kernels("torch.compile-fused", "the same through torch.compile", compiled, "torch.compile"),
    of_kernels(
        "torch.compile-max-autotune-fused",
        "the same, the other kernels chosen by timing them",
        compiled,
        "torch.compile-max-autotune",
    ),
    Backend("aoti", "an AOTInductor package", "aoti", ("cpu", "cuda"), packaged, torch_missing),
    Backend("onnxruntime", "ONNX Runtime, CPU provider", "onnx", ("cpu",), onnxruntime, onnxruntime_missing),
    of_provider("onnxruntime-cuda", "ONNX Runtime, CUDA provider", "CUDAExecutionProvider"),
    of_provider("onnxruntime-tensorrt", "ONNX Runtime, TensorRT provider", "TensorrtExecutionProvider"),
    Backend("tensorrt", "a TensorRT engine", "engine", ("cuda",), engine, tensorrt_missing),
    Backend(
        "tensorrt-cudagraphs",
        "a TensorRT engine, replayed as a CUDA graph",
        "engine",
        ("cuda",),
        partial(engine, graphs=True),
        tensorrt_missing,
    ),
)
BACKENDS: Mapping[str, Backend] = {row.name: row for row in _ROWS}


def backend_from_name(name: str) -> Backend:
    if name not in BACKENDS:
        raise InputError(
            f"unknown backend {name}", expected="one of " + ", ".join(BACKENDS), mend="`optimize doctor` tells of each"
        )
    return BACKENDS[name]


def runner_of(name: str, subject: Subject) -> Runner:
    """A backend's runner of the subject. Raises MissingError where the backend is not there: none stands in for it."""
    backend = backend_from_name(name)
    if why := backend.why_not(subject.device):
        raise MissingError(f"{name} is not available here", got=why, mend="`optimize doctor` tells what is missing")
    if backend.takes == "module" and subject.precision not in PRECISIONS:
        raise InputError(
            f"{name} runs the torch module, which has no {subject.precision}",
            got=subject.precision,
            expected=", ".join(PRECISIONS),
            mend="onnxruntime and tensorrt run quantized graphs",
        )
    return backend.make(subject)


def device_from_word(word: str) -> str:
    """`cpu`, `cuda`, or `auto`: the GPU where torch sees one."""
    import torch

    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if word not in ("cpu", "cuda"):
        raise InputError(f"unknown device {word}", expected="auto, cpu or cuda")
    if word == "cuda" and not torch.cuda.is_available():
        raise MissingError(
            "torch sees no GPU", got=f"torch {torch.__version__}", mend="--device cpu, or install torch's CUDA build"
        )
    return word
