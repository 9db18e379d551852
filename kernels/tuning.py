"""Which config a kernel takes for a problem: what was measured on this device, else what its heuristic says.

First the user's tuning cache, then the shipped table `tuned.json`, then the heuristic. Both tables are JSON: device
name -> kernel -> digest of its source and measured configs by problem. What other source measured does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from optimize.errors import MissingError

from .kernel import SMS, Kernel
from .select import interpreting

P = TypeVar("P")
C = TypeVar("C")
R = TypeVar("R")
Launch = Callable[..., R]
Table = dict[str, dict[str, dict[str, Any]]]
SHIPPED = Path(__file__).with_name("tuned.json")
"""Written by the GPU suite; absent until it has run."""
INTERPRETED_SM = 89
"""Whose configs the interpreter takes."""
AGREEMENT = 0.02
"""Relative L2 difference up to which two configs give the same result: only the order of roundings may differ."""


# --- what the device is ----------------------------------------------------------------------------------------------


@functools.cache
def sm_of(device: torch.device) -> int:
    """The newest compute capability of `SMS` that this device has: 90 for an H200. When interpreting 89."""
    if device.type != "cuda":
        return INTERPRETED_SM
    major, minor = torch.cuda.get_device_capability(device)
    served = [sm for sm in SMS if sm <= 10 * major + minor]
    if not served:
        raise MissingError(
            "the kernels cannot run on this GPU",
            got=f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}",
            expected="compute capability 8.0 or newer",
            mend='use impl="reference"',
        )
    return served[-1]


# --- the tables ------------------------------------------------------------------------------------------------------


def cache_path() -> Path:
    """`OPTIMIZE_CACHE`, or the user's cache folder."""
    base = os.environ.get("OPTIMIZE_CACHE")
    return (Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "optimize").expanduser() / (
        "kernels.json"
    )


def text_of(problem: Any) -> str:
    """A problem as a key of JSON: `rows=8192, columns=2560, dtype=fp16`."""
    return ", ".join(f"{f.name}={getattr(problem, f.name)}" for f in dataclasses.fields(problem))


@functools.cache
def digest_of_module(module: Any) -> str:
    jitted = {name: f for name, f in vars(module).items() if hasattr(f, "arg_names") and hasattr(f, "fn")}
    texts = [inspect.getsource(jitted[n].fn) for n in sorted(jitted)]
    texts += [Path(module.__file__).with_name(name).read_text() for name in getattr(module, "ALSO", ())]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def digest_of(kernel: Kernel[Any, Any]) -> str:
    """Hex SHA-256 of the source of all jitted functions in the kernel's file, and of the files that it names in `ALSO`:
    its helpers count, its tuner does not."""
    return digest_of_module(sys.modules[kernel.jit.fn.__module__])


def build_of(kernel: Kernel[Any, Any]) -> str:
    """The source and its compiler: a config was measured, and found right, with both."""
    import triton

    return f"{digest_of(kernel)} triton {triton.__version__}"


def say(path: Path, why: str) -> None:
    print(f"optimize: {path} is ignored: {why}. Delete it, or tune again.", file=sys.stderr)


@functools.cache
def table_of(path: Path) -> Table:
    """What a table says; nothing where there is none. A broken one is told of once and ignored."""
    if not path.exists():
        return {}
    try:
        table: Table = json.loads(path.read_text())
        for kernels in table.values():
            for entry in kernels.values():
                _ = [measured["config"].items() for measured in entry["configs"].values()], entry["digest"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        say(path, f"it is no table of measured configs ({type(e).__name__}: {e})")
        return {}
    return table


def measured_config(path: Path, kernel: Kernel[P, C], problem: P, name: str, sm: int) -> C | None:
    """The config that this table has for the problem on the device of that name."""
    entry = table_of(path).get(name, {}).get(kernel.name, {})
    measured = entry.get("configs", {}).get(text_of(problem))
    if measured is None or entry["digest"] != build_of(kernel):
        return None
    try:
        config = kernel.config(**measured["config"])
        why = kernel.prune(problem, config, sm)
    except TypeError as e:
        why = str(e)
    if why is None:
        return config
    say(path, f"its config of {kernel.name} for {text_of(problem)} cannot be taken ({why})")
    return None


CHOSEN: dict[tuple[str, Any, torch.device], Any] = {}
"""What `config_for` answered in this process: the hot path is one look into it."""
MET: dict[tuple[str, Any], Kernel[Any, Any]] | None = None
"""While tuning: the kernels that a launch asked for, by name and problem."""


def config_for(kernel: Kernel[P, C], problem: P, device: torch.device) -> C:
    """The config to launch with: measured by the user, else measured and shipped, else the heuristic's."""
    key = (kernel.name, problem, device)
    config: C | None = CHOSEN.get(key)
    if config is None:
        config = CHOSEN[key] = looked_up(kernel, problem, device)
    if MET is not None:
        MET[kernel.name, problem] = kernel
    return config


def looked_up(kernel: Kernel[P, C], problem: P, device: torch.device) -> C:
    sm = sm_of(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for path in (cache_path(), SHIPPED):
            config = measured_config(path, kernel, problem, name, sm)
            if config is not None:
                return config
    return kernel.heuristic(problem, sm)


def forget() -> None:
    """The tables are read anew at the next look-up."""
    CHOSEN.clear()
    table_of.cache_clear()


# --- measuring -------------------------------------------------------------------------------------------------------


def median_ms(call: Callable[[], Any]) -> float:
    """With a cold L2. Needs a GPU. Replayed from a CUDA graph: Python's part of a launch outlasts a short kernel."""
    import triton

    try:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    except RuntimeError:  # it cannot be captured
        torch.cuda.synchronize()
    return float(triton.testing.do_bench(call, return_mode="median"))


def candidates(kernel: Kernel[P, C], problem: P, sm: int) -> list[C]:
    """The heuristic's config first, then the space without what is pruned."""
    found = [kernel.heuristic(problem, sm), *kernel.space(problem, sm)]
    return list(dict.fromkeys(c for c in found if kernel.prune(problem, c, sm) is None))


def tune(
    kernel: Kernel[P, C],
    problem: P,
    make_launch: Callable[[C], Callable[[], R]],
    device: torch.device,
    *,
    wrong: Callable[[R], str | None],
    measure: Callable[[Callable[[], Any]], float] = median_ms,
) -> C:
    """Measures the search space for a problem, writes the fastest config into the user's cache and returns it.

    `make_launch(config)` gives what is measured; `wrong(result)` why its result is not right (None where it is): such a
    config, and one that fails to compile or to launch, has no figure and cannot win. MissingError where none is left.
    """
    figures: dict[C, float] = {}
    refused: list[str] = []
    for config in candidates(kernel, problem, sm_of(device)):
        launch = make_launch(config)
        try:
            why = wrong(launch())
            if why is None:
                figures[config] = measure(launch)
        except Exception as e:  # what Triton and ptxas raise has no common type
            why = f"{type(e).__name__}: {e}"
        if why is not None:
            refused.append(f"{config}: {why}")
    if not figures:
        raise MissingError(
            f"no config of {kernel.name} runs on this device",
            got="; ".join(refused[:3]) or "a search space that is pruned to nothing",
            expected=f"one that serves {text_of(problem)}",
        )
    best = min(figures, key=lambda c: figures[c])
    note = {
        "config": dataclasses.asdict(best),  # type: ignore[call-overload]
        "median_ms": figures[best],
        "spread": statistics.median(figures.values()) / figures[best],  # of the space: what tuning can matter
        "tried": len(figures),
        "refused": refused,
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    write(cache_path(), kernel, problem, name, note)
    CHOSEN[kernel.name, problem, device] = best
    return best


def write(path: Path, kernel: Kernel[Any, Any], problem: Any, name: str, note: Mapping[str, Any]) -> None:
    """Adds one measurement to a table in one atomic step; what was measured with other source goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        table_of.cache_clear()
        table = table_of(path)
        kernels = table.setdefault(name, {})
        entry = kernels.setdefault(kernel.name, {"digest": build_of(kernel), "configs": {}})
        if entry["digest"] != build_of(kernel):
            entry.update(digest=build_of(kernel), configs={})
        entry["configs"][text_of(problem)] = dict(note)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            file.write(json.dumps(table, indent=1, sort_keys=True) + "\n")
        Path(file.name).replace(path)
    table_of.cache_clear()


DONE: set[tuple[str, Any]] = set()
"""What was tuned since `tuning_on`."""
TUNING_DEVICE: torch.device | None = None


@contextlib.contextmanager
def tuning_on(device: torch.device) -> Iterator[None]:
    """Within it, each launch measures its kernels' search spaces for the problems that it meets, each once."""
    global TUNING_DEVICE  # noqa: PLW0603  (one process tunes one device)
    if device.type != "cuda":
        raise MissingError("tuning needs a GPU", got=f"the device {device}", expected="a CUDA device")
    DONE.clear()
    TUNING_DEVICE = device
    try:
        yield
    finally:
        TUNING_DEVICE = None


def tune_launch(
    launch: Launch[Any],
    args: tuple[Any, ...],
    device: torch.device,
    measure: Callable[[Callable[[], Any]], float] = median_ms,
) -> None:
    """Tunes every kernel that `launch(*args)` takes, one after another, judged by the whole launch's time."""
    global MET  # noqa: PLW0603
    MET = {}
    try:
        expected = [t.double() for t in tensors_of(launch(*args))]
        met = [(kernel, problem) for (_, problem), kernel in MET.items()]
    finally:
        MET = None

    def wrong(result: Any) -> str | None:
        return why_different(tensors_of(result), expected)

    for kernel, problem in met:
        if (kernel.name, problem) in DONE:
            continue
        place = (kernel.name, problem, next(a.device for a in args if isinstance(a, Tensor)))

        def make_launch(config: Any, place: Any = place) -> Callable[[], Any]:
            CHOSEN[place] = config
            return functools.partial(launch, *args)

        before = CHOSEN[place]
        try:
            CHOSEN[place] = tune(kernel, problem, make_launch, device, wrong=wrong, measure=measure)
        except BaseException:
            CHOSEN[place] = before
            raise
        DONE.add((kernel.name, problem))


def tensors_of(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]


def why_different(found: list[Tensor], expected: list[Tensor]) -> str | None:
    """Against the heuristic's result, which the tests prove. Not a number differs from everything."""
    for a, b in zip(found, expected, strict=True):
        difference = ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()
        if not difference <= AGREEMENT:
            return f"its result differs by {difference:.2g} of the heuristic's"
    return None


# --- what every launch goes through ----------------------------------------------------------------------------------


@overload
def interpretable(launch: Launch[R]) -> Launch[R]: ...
@overload
def interpretable(launch: None = None, *, like: int) -> Callable[[Launch[R]], Launch[R]]: ...
def interpretable(launch: Launch[Any] | None = None, *, like: int = 0) -> Any:
    """Wraps a launch (positional arguments; a tensor or a tuple of tensors of the type of argument `like`).

    When interpreting, bf16 tensors go in as fp32 and the results are rounded by torch: Triton 3.7.1's interpreter
    multiplies the bit patterns of bf16 and rounds towards zero. Within `tuning_on` the launch is tuned first.
    """
    if launch is None:
        return functools.partial(interpretable, like=like)

    @functools.wraps(launch)
    def run(*args: Any) -> Any:
        with torch.cuda.device_of(args[like]):  # Triton launches on the current device; nothing for a CPU's tensor
            if TUNING_DEVICE is not None:
                tune_launch(launch, args, TUNING_DEVICE)
            if not interpreting():
                return launch(*args)
            return widened(launch, args, args[like].dtype)

    return run


def widened(launch: Launch[Any], args: tuple[Any, ...], dtype: torch.dtype) -> Any:
    """bf16 in as fp32, and results that would be bf16 rounded to it."""
    result = launch(*(a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in args))
    if dtype != torch.bfloat16:
        return result
    rounded = tuple(t.to(dtype) for t in tensors_of(result))
    return rounded if isinstance(result, tuple) else rounded[0]
