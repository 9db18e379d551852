"""Seats: one candidate of a profile, ready to be run: a backend's runner with feeds bound. `python -m` serves one.

Feeds and outputs travel as safetensors files; answers are plain data.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError

if TYPE_CHECKING:
    from optimize.compile.runners import Runner
    from optimize.compile.spec import Component


@dataclass(frozen=True)
class Job:
    """What a seat runs. `folder` is a bundle, else `source` is read; `axes` are (min, opt, max) by name; `path` a file
    that no bundle claims (a package made for this profile)."""

    component: str
    backend: str
    precision: str
    folder: str | None = None
    source: str = ""
    artifact: str | None = None
    path: str | None = None
    axes: Mapping[str, tuple[int, int, int]] | None = None
    device: str = "cpu"
    threads: int = 0
    trust: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The precision without what else the artifact's name has: `fp32+kernels` -> `fp32`."""
        return self.precision.partition("+")[0]


class Seat:
    """A runner that is opened, fed and run. Methods give plain data, so that they can be called across a pipe."""

    def __init__(self, runner: Callable[[], Runner], device: str = "cpu", threads: int = 0) -> None:
        self.make, self.device, self.threads = runner, device, threads
        self.runner: Any = None
        self.run: Callable[[], Any] | None = None
        self.before = self.taken = self.peak = 0

    def open(self) -> dict[str, float]:
        """Loads it. `load_s` is from the file to ready, without importing libraries."""
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        self.runner = self.make()
        self.before = used_bytes(self.device)
        with self.counted():
            start = time.perf_counter()
            self.runner.__enter__()
            return {"load_s": time.perf_counter() - start}

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """What a step takes of the GPU's memory. Other seats lie idle on the same GPU meanwhile: what they have taken
        since this one was opened is not its own."""
        if self.device == "cpu":
            yield
            return
        before = used_bytes(self.device)
        yield
        self.taken += used_bytes(self.device) - before
        self.peak = max(self.peak, self.taken)

    def bind(self, feeds: str) -> dict[str, Any]:
        """Binds feeds; the first run of all is timed apart, and compiles where the backend does."""
        with self.counted():
            self.run = self.runner.bind(read(feeds))
            first, second = self.once(), self.once()
        return {"first_ms": first, "second_ms": second, "cached": bool(getattr(self.runner, "cached", 0))}

    def once(self) -> float:
        assert self.run is not None, "bind first"
        start = time.perf_counter()
        self.run()
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def outputs(self, feeds: str, out: str, bound: bool = True) -> list[str]:
        """Writes what it gives for these feeds; `bound` by the very function that is timed. Gives the names."""
        from safetensors.torch import save_file

        given = read(feeds)
        with self.counted():
            found = self.runner.bind(given)() if bound else self.runner.infer(given)
        save_file({n: t.detach().cpu().clone().contiguous() for n, t in found.items()}, out)
        return list(found)

    def burst(self, ms: float, warmup_ms: float, cold: bool) -> dict[str, Any]:
        from optimize.profiles.timing import burst_of

        assert self.run is not None, "bind first"
        return asdict(burst_of(self.run, self.device, ms, warmup_ms, cold))

    def memory(self) -> dict[str, int | None]:
        """Peaks above what the process had before it was opened; on a GPU what its own steps have taken."""
        if self.device != "cpu":
            return {"host": None, "device": self.peak}
        return {"host": max(0, host_peak_bytes() - self.before), "device": None}

    def close(self) -> None:
        if self.runner is not None:
            self.runner.__exit__(None, None, None)
        self.runner = self.run = None


def read(path: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(path)
    return found


def used_bytes(device: str) -> int:
    """Memory in use now, on a GPU by all its processes (allocators keep what they took); a CPU's peak is counted from
    here on."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free
    import psutil

    with contextlib.suppress(OSError):  # resets the peak: see proc(5), clear_refs
        Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def host_peak_bytes() -> int:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def seat_of(job: Job) -> Seat:
    return Seat(lambda: runner_of_job(job), job.device, job.threads)


def runner_of_job(job: Job) -> Runner:
    from optimize.compile.backends import Subject, runner_of
    from optimize.deploying import runner_of_artifact
    from optimize.loading import load

    if job.folder is not None and job.artifact is not None:
        bundle = load(job.folder, trust_remote_code="remote code" in job.trust).bundle
        artifact = bundle.manifest.artifacts[job.artifact]
        return runner_of_artifact(bundle, artifact, job.backend, job.device, job.threads)
    path, component = Path(job.path) if job.path else None, component_of_job(job)
    component.build()  # imports what the model is made of, so that loading is timed without
    return runner_of(job.backend, Subject(component, job.base, path, job.device, job.threads))


def component_of_job(job: Job) -> Component:
    """The component from its source, with the job's axes."""
    from optimize.compile.spec import Axis
    from optimize.loading import component_of, load

    if job.folder is not None:
        trusted = "remote code" in job.trust
        return component_of(load(job.folder, trust_remote_code=trusted).bundle, job.component, trusted)
    from optimize.compile.sources import Trust, source_from_text

    trust = Trust("pickle" in job.trust, "remote code" in job.trust)
    source = source_from_text(job.source, trust, (job.component,))
    found = next((c for c in source.components if c.name == job.component), None)
    if found is None:
        raise InputError(
            f"{job.source} has no component {job.component}", got=", ".join(c.name for c in source.components)
        )
    axes = {n: Axis(n, *sizes, found.axes[n].step) for n, sizes in (job.axes or {}).items()}
    return found.with_axes(axes)


def main() -> None:
    from optimize.profiles.workers import serve

    serve(lambda data: seat_of(Job(**{**data, "trust": tuple(data["trust"])})))


if __name__ == "__main__":
    main()
