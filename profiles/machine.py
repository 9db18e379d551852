"""The machine under a measurement: what it is, what its GPU's driver says, and how much of it others took meanwhile."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .schema import Gpu, Load, Machine

BUSY = 0.05
"""Share of the machine's processor time that others (or its host) may take before a record says so."""
VECTOR = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
PACKAGES = (
    "optimize",
    "torch",
    "triton",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "diffusers",
    "transformers",
)


def machine_here(device: str, threads: int = 0) -> Machine:
    """This machine, as records have it. `threads` of a CPU measurement (0: all cores)."""
    import psutil

    gpu = gpu_here() if device == "cuda" else None
    cpu, cores = processor(), len(os.sched_getaffinity(0))
    used = threads or cores
    return Machine(
        key=f"{gpu.name}, driver {gpu.driver}" if gpu else f"{cpu}, {cores} cores, {used} threads",
        device="cuda" if gpu else "cpu",
        cpu=cpu,
        cores=cores,
        threads=used,
        vector=[f for f in VECTOR if f in flags()],
        memory_bytes=int(psutil.virtual_memory().total),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        gpu=gpu,
        versions=dict(versions()),
        commit=commit(),
    )


def about_processor() -> dict[str, str]:
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        return {name.strip(): value.strip() for name, _, value in lines}
    return {}


def processor() -> str:
    return about_processor().get("model name") or platform.processor() or platform.machine()


def flags() -> set[str]:
    return set(about_processor().get("flags", "").split())


def versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def commit() -> str:
    """The revision of our own sources, where they are a git checkout; "+" where they were changed since."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if not done.returncode else ""

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
    except OSError:  # no git
        return ""
    return revision + ("+" if revision and git("status", "--porcelain", "--", "*.py") else "")


# --- load ------------------------------------------------------------------------------------------------------------


def together(loads: Sequence[Load]) -> Load:
    """Of several runs that one record is made of: the worst of them, and whatever any of them saw."""
    worst = max(loads, key=lambda x: max(x.others, x.stolen))
    throttled = tuple(sorted({why for x in loads for why in x.gpu_throttled}))
    return worst.model_copy(update={"busy": any(x.busy for x in loads), "gpu_throttled": throttled})


class Meter:
    """How much of the machine went to others since it was made. `note()` also keeps the GPU's clock and temperature."""

    def __init__(self, device: str) -> None:
        self.device, self.start, self.before = device, time.perf_counter(), processor_seconds()
        self.clocks: list[float] = []
        self.temperatures: list[float] = []
        self.throttled: set[str] = set()

    def note(self) -> None:
        if self.device != "cuda":
            return
        if (nvml := nvml_or_none()) is not None:
            library, handle = nvml
            with contextlib.suppress(library.NVMLError):
                self.clocks.append(library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM))
                self.temperatures.append(library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU))
                self.throttled |= set(throttling(library, handle))

    def load(self, ours: Iterable[int] = ()) -> Load:
        """`ours` are the processes that still work for this measurement."""
        seconds, now = time.perf_counter() - self.start, processor_seconds(ours)
        whole = seconds * (os.cpu_count() or 1)
        busy, own, stolen = (b - a for a, b in zip(self.before, now, strict=True))
        others, share = max(0.0, (busy - own) / whole), max(0.0, stolen / whole)
        return Load(
            seconds=seconds,
            others=others,
            stolen=share,
            busy=others > BUSY or share > BUSY,
            gpu_clock_sm_mhz=(min(self.clocks), max(self.clocks)) if self.clocks else None,
            gpu_temperature_c=(min(self.temperatures), max(self.temperatures)) if self.temperatures else None,
            gpu_throttled=tuple(sorted(self.throttled)),
        )


def processor_seconds(ours: Iterable[int] = ()) -> tuple[float, float, float]:
    """(all processes', our own and our children's, what the host took), processor seconds since each began."""
    import psutil

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own = sum(u.ru_utime + u.ru_stime for u in used)
    for pid in ours:
        with contextlib.suppress(psutil.Error):
            own += sum(psutil.Process(pid).cpu_times()[:2])
    times = psutil.cpu_times()
    busy = sum(getattr(times, name, 0.0) for name in ("user", "system", "nice", "irq", "softirq"))
    return busy, own, getattr(times, "steal", 0.0)


# --- GPU -------------------------------------------------------------------------------------------------------------


@cache
def nvml_or_none() -> tuple[Any, Any] | None:
    """(NVML, the handle of torch's GPU); None where there is no driver or the package is not installed.

    NVML counts all GPUs of the machine, in another order and whatever CUDA_VISIBLE_DEVICES hides: the UUID is the same.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml, handle_of_uuid(pynvml) or pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None


def handle_of_uuid(library: Any) -> Any:
    """None where torch tells no UUID, or NVML knows none such."""
    import torch

    with contextlib.suppress(library.NVMLError, AttributeError, RuntimeError, AssertionError):
        uuid = str(torch.cuda.get_device_properties(0).uuid)
        return library.nvmlDeviceGetHandleByUUID((uuid if uuid.startswith("GPU-") else f"GPU-{uuid}").encode())
    return None


def gpu_here() -> Gpu:
    import torch

    about = torch.cuda.get_device_properties(0)
    found = Gpu(name=about.name, sm=about.major * 10 + about.minor, memory_bytes=about.total_memory, driver="unknown")
    if (nvml := nvml_or_none()) is None:
        return found
    library, handle = nvml

    def ask(question: str, *words: Any) -> Any:
        try:
            return getattr(library, question)(*words)
        except library.NVMLError:  # not every board tells everything
            return None

    limit, sm, memory = ask("nvmlDeviceGetEnforcedPowerLimit", handle), library.NVML_CLOCK_SM, library.NVML_CLOCK_MEM
    persistence = ask("nvmlDeviceGetPersistenceMode", handle)
    return found.model_copy(
        update={
            "driver": str(ask("nvmlSystemGetDriverVersion") or "unknown"),
            "power_limit_w": limit / 1000 if limit else None,
            "clock_sm_mhz": ask("nvmlDeviceGetClockInfo", handle, sm),
            "clock_sm_max_mhz": ask("nvmlDeviceGetMaxClockInfo", handle, sm),
            "clock_memory_mhz": ask("nvmlDeviceGetClockInfo", handle, memory),
            "temperature_c": ask("nvmlDeviceGetTemperature", handle, library.NVML_TEMPERATURE_GPU),
            "persistence": None if persistence is None else bool(persistence),
        }
    )


THROTTLES = {
    "power limit": "nvmlClocksThrottleReasonSwPowerCap",
    "heat": "nvmlClocksThrottleReasonSwThermalSlowdown",
    "heat (hardware)": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "power brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
}


def throttling(library: Any, handle: Any) -> list[str]:
    """Why the GPU runs slower than it could, now."""
    reasons = library.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return [word for word, name in THROTTLES.items() if reasons & getattr(library, name, 0)]


def gpu_joules() -> float | None:
    """The GPU's energy counter, in joules since the driver was loaded; None where it has none."""
    if (nvml := nvml_or_none()) is None:
        return None
    library, handle = nvml
    with contextlib.suppress(library.NVMLError):
        return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    return None
