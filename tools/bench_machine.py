"""The machine under a benchmark: what a record says of it, its workers, and the environments that others need on it."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimize.errors import MissingError

BUSY = 0.05  # share of the machine's time that other processes may take before a record says so
WORKER = Path(__file__).resolve().with_name("bench_workers.py")
TORCH = ("torch==2.13.0",)  # first and alone: with it in place nothing pulls torch's CUDA packages
OPTIMUM_ENV = (
    TORCH,
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
MODELOPT_ENV = (
    TORCH,
    (
        "nvidia-modelopt==0.47.0",
        "onnx==1.23.2",
        "onnxruntime==1.31.1",
        "onnxscript==0.7.2",
        "onnx-graphsurgeon==0.6.1",
        "onnxslim==0.1.98",
        "onnxconverter-common==1.16.0",
        "lief==1.0.0",
        "cppimport==26.4.17",
    ),
)


class WorkerFailed(Exception):
    """A worker ended without a result; the text is the last thing that it said."""


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
    from optimize.profiles import machine

    return {
        "cpu": machine.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "vector": sorted(machine.flags() & set(machine.VECTOR)),
        "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
    }


def commit(root: Path) -> dict[str, Any]:
    """The revision, and whether the sources that it names were changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = bool(git("status", "--porcelain", "--", "*.py"))
    return {"revision": git("rev-parse", "HEAD") or "unknown", "changed": changed}


def run_worker(
    job: Mapping[str, Any], python: Path | str = sys.executable, hide: Path | None = None, env: Mapping[str, str] = {}
) -> dict[str, Any]:
    """One job of `bench_workers` in a process of its own, its cache in the job's folder.

    Raises WorkerFailed, whose text does not name the folder `hide`.
    """
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    done = subprocess.run(
        [str(python), "-P", str(WORKER)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env, "OPTIMIZE_CACHE": str(folder / "cache")},
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        last = last_words(done.stderr or done.stdout or "silent")
        raise WorkerFailed(f"exit code {done.returncode}: {last.replace(str(hide or folder), '')[:300]}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {**result, "process_s": seconds}


def last_words(text: str) -> str:
    """The last line that is not indented, with those that are and follow: an exception's name and its text."""
    lines = text.strip().splitlines()
    begin = max((i for i, line in enumerate(lines) if not line[:1].isspace()), default=0)
    return "; ".join(line.strip() for line in lines[begin:])


def make_env(folder: Path, env: tuple[tuple[str, ...], ...]) -> Path:
    """A virtual environment with versions that live together; gives its Python."""
    python = folder / "bin" / "python"
    commands: list[list[str]] = [[sys.executable, "-m", "venv", str(folder)]]
    commands += [[str(python), "-m", "pip", "install", *packages] for packages in env]
    for command in commands:
        say(" ".join(command[1:]))
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            raise MissingError("the environment could not be made", got=" ".join(command[1:]), mend="read pip's words")
    return python
