"""The machine under a benchmark: what a record says of it, and the environment that optimum-onnx needs on it."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from optimize.errors import MissingError

BUSY = 0.05  # share of the machine's time that other processes may take before a record says so
OPTIMUM_ENV = (
    ("torch==2.13.0",),  # first and alone: with it in place nothing pulls torch's CUDA packages
    (
        "transformers==4.57.6",
        "diffusers==0.39.0",
        "optimum==2.1.0",
        "optimum-onnx==0.1.0",
        "onnx==1.23.2",
        "onnxruntime==1.31.1",
        "accelerate==1.15.0",
    ),
)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def cpu_seconds() -> tuple[float, float]:
    """(of the whole machine, of our own finished workers and ourselves), busy processor seconds since they began."""
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy, sum(u.ru_utime + u.ru_stime for u in used)


class Load:
    """How much of the machine went to others while the benchmark ran."""

    def __init__(self) -> None:
        self.before, self.start, self.cpu = os.getloadavg(), time.perf_counter(), cpu_seconds()

    def so_far(self) -> dict[str, Any]:
        seconds, now = time.perf_counter() - self.start, cpu_seconds()
        others = (now[0] - self.cpu[0]) - (now[1] - self.cpu[1])
        share = max(0.0, others / (seconds * (os.cpu_count() or 1)))
        return {
            "average_before": self.before,
            "average_after": os.getloadavg(),
            "seconds": seconds,
            "others": share,
            "busy": share > BUSY,
        }


def device() -> dict[str, Any]:
    """The processor, its vector instructions, cores that this process may use, and memory."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    about = {name.strip(): value.strip() for name, _, value in lines}
    flags = about.get("flags", "").split()
    return {
        "cpu": about.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "vector": sorted(f for f in flags if f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")),
        "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
    }


def commit(root: Path) -> dict[str, Any]:
    """The revision, and whether the sources that it names were changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = bool(git("status", "--porcelain", "--", "*.py"))
    return {"revision": git("rev-parse", "HEAD") or "unknown", "changed": changed}


def make_optimum_env(folder: Path) -> Path:
    """A virtual environment with the versions of optimum-onnx and its libraries that live together."""
    python = folder / "bin" / "python"
    commands: list[list[str]] = [[sys.executable, "-m", "venv", str(folder)]]
    commands += [[str(python), "-m", "pip", "install", *packages] for packages in OPTIMUM_ENV]
    for command in commands:
        say(" ".join(command[1:]))
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            raise MissingError("the environment could not be made", got=" ".join(command[1:]), mend="read pip's words")
    return python
