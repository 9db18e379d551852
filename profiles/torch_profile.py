"""torch.profiler's events, mapped back to modules: for eager, torch.compile and AOTInductor packages.

A piece is the outermost operator in a module (`aten::conv2d`, not what it calls), or a kernel of compiled code. On a
GPU its time is that of the kernels that it launched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined] # torch's stubs do not export it
from torch.profiler import ProfilerActivity, profile, record_function

from .compiled_code import KernelOrigins, named_kernels
from .operators import WARM, Piece, Profiled, Run, median_ms, wait_for

if TYPE_CHECKING:
    from optimize.compile.runners import Feeds, Runner

MODULE, RUN = "module::", "one run"

WORDS: tuple[tuple[str, str], ...] = (
    ("attention", "attention"),
    ("flash", "attention"),
    ("qlinear", "matmul"),
    ("conv", "convolution"),
    ("embedding", "layout"),
    ("linear", "matmul"),
    ("matmul", "matmul"),
    ("addmm", "matmul"),
    ("einsum", "matmul"),
    ("bmm", "matmul"),
    ("_mm", "matmul"),
    ("::mm", "matmul"),
    ("gemm", "matmul"),
    ("softmax", "softmax"),
    ("norm", "norm"),
    ("interpolate", "resize"),
    ("upsample", "resize"),
    ("quantize", "quantize"),
    ("index_select", "layout"),
    ("permute", "layout"),
    ("transpose", "layout"),
    ("cat", "layout"),
    ("copy", "layout"),
    ("clone", "layout"),
    ("contiguous", "layout"),
    ("reshape", "layout"),
    ("view", "layout"),
    ("pad", "layout"),
    ("mean", "reduction"),
    ("sum", "reduction"),
    ("argmax", "reduction"),
)
"""Part of an operator's or a fused kernel's name -> kind of work: the first that fits."""
PLAIN = (
    " add sub mul div neg abs silu gelu relu sigmoid tanh exp log sin cos sqrt rsqrt pow where maximum minimum clamp "
    "to _to_copy reciprocal eq ne lt le gt ge leaky_relu softplus erf round floor "
)
VIEWS = (
    " unsqueeze squeeze expand slice select flatten unflatten chunk split as_strided detach t empty arange zeros ones "
    "full stack size lift_fresh "
)


def kind_of(name: str) -> str:
    if "_fused_" in name and "_tem_" not in name:  # compiled: a template alone computes a product
        return next((kind for kind in ("attention", "norm", "softmax") if kind in name), "elementwise")
    plain = f" {name.rpartition('::')[2].rstrip('_')} "
    if plain in PLAIN:
        return "elementwise"
    if plain in VIEWS:
        return "layout"
    return next((kind for word, kind in WORDS if word in name), "other")


def profile_torch(runner: Runner, feeds: Feeds, runs: int, trace: Path | None) -> Profiled:
    """Profiles a runner that is not entered yet; what it compiles is compiled with its kernels' names."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes its starts and stops on stderr
    with named_kernels(runner) as origins, runner:
        run = runner.bind(feeds)
        device = getattr(runner, "device", "cpu")
        cuda, wait = device != "cpu", wait_for(device)
        unprofiled = median_ms(run, runs, wait)
        whole = origins is not None and not getattr(getattr(runner, "style", None), "regional", False)
        module = None if whole else getattr(runner, "_module", None)
        with marked(module) if module is not None else contextlib.nullcontext():
            prof = recorded(run, runs, wait, cuda)
    if trace is not None:
        prof.export_chrome_trace(str(trace))
    found = list(runs_of(prof, cuda, origins))[WARM:]
    return Profiled(found, told(found, module is not None, cuda), unprofiled, trace)


def told(runs: Sequence[Run], marked: bool, cuda: bool) -> str:
    if marked:
        return "torch.profiler, modules marked by hooks"
    if cuda or any("fused" in p.kernel or "aoti_torch_" in p.kernel for r in runs for p in r.pieces):
        return "torch.profiler, kernels of compiled code"
    return (
        "torch.profiler; this package was compiled without its kernels' names (cpp.enable_kernel_profile), so most of "
        "what it computes counts as outside"
    )


@contextlib.contextmanager
def marked(module: torch.nn.Module) -> Iterator[None]:
    """Each module's forward is an event of the profiler while this lasts, down to those that are compiled."""
    hooks: list[Any] = []
    open_marks: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            mark = record_function(MODULE + name)
            mark.__enter__()
            open_marks.append(mark)

        return hook

    def leave(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    compiled = {name: m for name, m in module.named_modules() if m._compiled_call_impl is not None}
    calls = {name: m._compiled_call_impl for name, m in compiled.items()}
    for name, child in compiled.items():
        child._compiled_call_impl = named(calls[name], MODULE + name)
    for name, child in module.named_modules():
        if any(name == c or name.startswith(f"{c}.") for c in compiled):
            continue  # hooks inside would be compiled too
        hooks.append(child.register_forward_pre_hook(enter(name)))
        hooks.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, child in compiled.items():
            child._compiled_call_impl = calls[name]


def named(call: Any, name: str) -> Callable[..., Any]:
    def run(*args: Any, **words: Any) -> Any:
        with record_function(name):
            return call(*args, **words)

    return run


def recorded(run: Callable[[], Any], runs: int, wait: Callable[[], Any], cuda: bool) -> profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    prof = profile(activities=activities)
    with prof:
        for _ in range(WARM + runs):
            with record_function(RUN):
                run()
                wait()
    return prof


def runs_of(prof: profile, cuda: bool, origins: KernelOrigins | None) -> Iterator[Run]:
    """Each run with its pieces. Times of events are microseconds."""
    for event in prof.events() or ():
        if event.name == RUN and event.device_type == DeviceType.CPU:  # a GPU's activity has another of that name
            reading = origins.reading() if origins is not None else None
            pieces: list[Piece] = []
            for top, module, region in outermost(event):
                inner = reading.module(region, top.name) if reading is not None else ""
                pieces += pieces_of(top, ".".join(filter(None, (module, inner))), cuda)
            yield Run(event.cpu_time_total / 1e3, pieces)


REGION = "Torch-Compiled Region"
WRAPPERS = (REGION, "## Call CompiledFxGraph", "AOTInductor", "AOTIModel", "inductor::")


def outermost(event: Any, module: str = "", region: str = "") -> Iterator[tuple[Any, str, str]]:
    """Operators that no other operator calls, each with the innermost module and the compiled region around it."""
    for child in sorted(event.cpu_children, key=lambda e: e.time_range.start):
        if child.name.startswith(MODULE):
            yield from outermost(child, child.name.removeprefix(MODULE), region)
        elif child.cpu_children and child.name.startswith(WRAPPERS):
            yield from outermost(child, module, child.name if child.name.startswith(REGION) else region)
        elif any(word in child.name for word in ("::", "fused", "kernel", "aoti_torch_")):
            yield child, module, region
        else:
            yield from outermost(child, module, region)


def pieces_of(top: Any, module: str, cuda: bool) -> Iterator[Piece]:
    if not cuda:
        yield Piece(module, kind_of(top.name), heaviest(top), top.cpu_time_total / 1e3)
        return
    for kernel in kernels_of(top):
        yield Piece(module, kind_of(top.name), kernel.name, kernel.duration / 1e3)


def heaviest(top: Any) -> str:
    """The operator below `top` that takes the most time itself, but for copies: what computes it."""
    computing = [e for e in below(top) if kind_of(e.name) not in ("layout", "other")]
    found: Any = max(computing or [top], key=lambda e: e.self_cpu_time_total)
    return str(found.name)


def below(event: Any) -> Sequence[Any]:
    return [event, *(e for child in event.cpu_children for e in below(child))]


def kernels_of(top: Any) -> list[Any]:
    return [kernel for event in below(top) for kernel in event.kernels]
