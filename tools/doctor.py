"""Which parts of the toolkit work on this machine, why the others do not, and how to mend that.

Packages are looked up by their metadata; only ONNX Runtime and TensorRT are imported, to ask what they can do.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from optimize.compile.tensorrt import Flavour, current_gpu, flavours
from optimize.errors import MissingError

NEEDED_GIB = 10  # of disk and of memory: SDXL's U-Net in fp16 is 5 GiB, and so is its engine
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Check:
    """One finding. `mend` says what to do, and is None where nothing is to be done."""

    name: str
    ok: bool
    detail: str
    mend: str | None = None


def doctor() -> list[Check]:
    """Every check, in the order in which a person would look. Raises nothing, whatever is missing or broken."""
    return [check() for check in CHECKS]


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, version, None if ok else "install Python 3.11 or later")


def gpu() -> Check:
    """The GPU that the driver shows, and whether the installed torch can use it."""
    try:
        device, sm = current_gpu()
    except MissingError as error:
        detail = f"{error.what}: {error.got}; exporting, parity and TensorRT-RTX builds for other GPUs do work"
        return Check("gpu", False, detail, "install the NVIDIA driver to run engines and to measure")
    torch = _version("torch") or ""
    if "+cpu" in torch:
        return Check("gpu", False, f"{device}, sm{sm}, but torch {torch} has no CUDA", "install torch's CUDA build")
    return Check("gpu", True, f"{device}, sm{sm}")


def package(name: str, mend: str | None = None) -> Check:
    """Whether the distribution `name` is installed, in a version that our own requirements allow."""
    version, wanted = _version(name), _requirements().get(name, "")
    mend = mend or f'pip install "{name}{wanted}"'
    if version is None:
        return Check(name, False, "not installed", mend)
    if not _allows(wanted, version):
        return Check(name, False, f"{version}, but {wanted} is needed", mend)
    return Check(name, True, version)


def onnxruntime() -> Check:
    """The version and the execution providers that it is built with; two distributions would share one import name."""
    found = {name: version for name in ("onnxruntime-gpu", "onnxruntime") if (version := _version(name))}
    both = "pip uninstall onnxruntime onnxruntime-gpu, then install one of them again"
    if len(found) == 2:
        return Check(
            "onnxruntime", False, "onnxruntime and onnxruntime-gpu are both installed and break each other", both
        )
    if not found:
        return Check("onnxruntime", False, "not installed", "pip install onnxruntime, or onnxruntime-gpu")
    ((name, version),) = found.items()
    try:
        providers = import_module("onnxruntime").get_available_providers()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Check("onnxruntime", False, f"{name} {version} cannot be imported: {error}", both)
    names = ", ".join(provider.removesuffix("ExecutionProvider") for provider in providers)
    return Check("onnxruntime", True, f"{name} {version}, built with {names}")


def tensorrt() -> Check:
    return _flavour_check(flavours()[0], "pip install tensorrt, on a machine with the GPU that engines are for")


def tensorrt_rtx() -> Check:
    return _flavour_check(flavours()[1], "pip install tensorrt-rtx")


def native_library() -> Check:
    """Our operators for ONNX Runtime. Graphs of `--kernels` run without it too, by the bodies of their nodes."""
    from optimize.kernels.native_library import ort_library

    try:
        return Check("native library", True, str(ort_library()))
    except MissingError as error:
        return Check("native library", False, f"{error.what}; graphs of --kernels run by their bodies", error.mend)


def chromium() -> Check:
    """Only the browser test of the Netron view needs it; Netron itself uses any browser."""
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    return Check("chromium", path is not None, path or "not found", None if path else "apt-get install chromium")


def disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return _room("disk", free, "free some space, or choose an --out elsewhere")


def memory() -> Check:
    free = _available_memory_gib()
    if free is None:
        return Check("memory", True, "this system does not say how much is free")
    return _room("memory", free, "close other programs, or export one component at a time (--component)")


CHECKS: tuple[Callable[[], Check], ...] = (
    python,
    lambda: package("torch"),
    gpu,
    lambda: package("triton", "pip install triton (Linux only)"),
    lambda: package("onnx"),
    onnxruntime,
    native_library,
    tensorrt,
    tensorrt_rtx,
    lambda: package("diffusers"),
    lambda: package("transformers"),
    lambda: package("optimum"),
    lambda: package("netron"),
    chromium,
    disk,
    memory,
)


def _flavour_check(flavour: Flavour, mend: str) -> Check:
    if flavour.why_not:
        return Check(flavour.module, False, " ".join(filter(None, (flavour.version, flavour.why_not))), mend)
    return Check(flavour.module, True, f"{flavour.version}: builds for " + ", ".join(f"sm{sm}" for sm in flavour.sms))


def _room(name: str, free_gib: float, mend: str) -> Check:
    ok = free_gib >= NEEDED_GIB
    return Check(name, ok, f"{free_gib:.1f} GiB free", None if ok else f"{NEEDED_GIB} GiB are good to have: {mend}")


def _available_memory_gib() -> float | None:
    """What Linux calls MemAvailable; elsewhere the physical size, or None where the system tells neither."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) / 2**20
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> Mapping[str, str]:
    """Distribution -> version range, from our own metadata; empty where that or `packaging` is missing."""
    if find_spec("packaging") is None or _version("optimize") is None:
        return {}
    from packaging.requirements import Requirement

    return {r.name: str(r.specifier) for r in map(Requirement, metadata.requires("optimize") or [])}


def _allows(wanted: str, version: str) -> bool:
    if not wanted:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)
