"""Eager without the weights in memory: each module's come when it runs and go when it has run.

Several runs at different sizes go in lockstep, one thread each, so that every weight is read once for all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .onnx_model import same_as
from .spec import Component
from .trace import cast
from .wide import weight_in

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
TOGETHER = 1 << 19  # input numbers of the runs that go in lockstep: their activations are in memory together
Tensors = Mapping[str, torch.Tensor]
Fetch = Callable[[str, Callable[[], Tensors]], Tensors]


def set_tensor(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    child = module.get_submodule(path)
    if last in child._parameters:
        child._parameters[last] = torch.nn.Parameter(value, requires_grad=False)
    else:
        child._buffers[last] = value


def slot_of(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The parameter or buffer of that path."""
    path, _, last = name.rpartition(".")
    child = module.get_submodule(path)
    return child._parameters.get(last, child._buffers.get(last))


def return_large_blocks() -> None:
    """Freed blocks of a megabyte and more go back to the system at once. glibc raises that limit to 32 MB by itself,
    and weights that come and go then leave holes: SDXL's U-Net, streamed, grew to 4.0 GB; so it stays at 0.7."""
    with contextlib.suppress(AttributeError, OSError):  # another libc has no such habit
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def fetch_alone(_: str, read: Callable[[], Tensors]) -> Tensors:
    return read()


def streamed_module(
    component: Component, precision: str, fetch: Fetch = fetch_alone, wide: bool = False
) -> torch.nn.Module:
    """The module on meta, with hooks that bring each submodule's own tensors in before it runs and drop them after.

    `fetch(path, read)` gives them; `wide` is for weights beyond fp16's range, see `wide.weight_in`. What stands beside
    submodules (a position table) stays as long as its module runs.
    """
    module = cast(component.build(), precision)
    weights = component.weights.bind(module)
    tied = same_as(module)
    checkpoint = {name: tensor.dtype for name, tensor in module.state_dict(keep_vars=True).items()}
    for prefix, child in module.named_modules():
        own = [*child._parameters, *child._buffers]
        if isinstance(child, torch.nn.MultiheadAttention):  # reads its child's tensors and never calls it
            own += [f"out_proj.{n}" for n in child.out_proj._parameters]
        own = [n for n in own if f"{prefix}.{n}".lstrip(".") in checkpoint]
        shapes = {n: slot.shape for n in own if (slot := slot_of(child, n)) is not None}
        if not shapes:
            continue

        def load(child: torch.nn.Module, _: Any, prefix: str = prefix, shapes: Any = shapes) -> None:
            def read() -> Tensors:
                full = {n: f"{prefix}.{n}".lstrip(".") for n in shapes}
                made = {n: weight_in(weights.tensor(tied.get(f, f)), checkpoint[f], wide) for n, f in full.items()}
                return {n: tensor.reshape(shapes[n]) for n, tensor in made.items()}

            for n, tensor in fetch(prefix, read).items():
                set_tensor(child, n, tensor)

        def drop(child: torch.nn.Module, *_: Any, shapes: Any = shapes) -> None:
            for n, shape in shapes.items():
                old = slot_of(child, n)
                assert old is not None
                set_tensor(child, n, torch.empty(shape, dtype=old.dtype, device="meta"))

        child.register_forward_pre_hook(load)
        child.register_forward_hook(drop)
    return module


class DivergedError(Exception):
    """Two runs of one model came to different modules: they cannot share its weights step by step."""


class Lockstep:
    """Holds runs of one model together: at each module all wait, one reads its weights, and all take them."""

    def __init__(self, runs: int) -> None:
        self.barrier = threading.Barrier(runs)
        self.at: dict[int, str] = {}
        self.held: Tensors = {}

    def arrive(self, path: str) -> bool:
        """Waits for all at one place; True for one of them. Raises DivergedError where they are at several."""
        self.at[threading.get_ident()] = path
        first = self.barrier.wait() == 0
        if len(set(self.at.values())) > 1:
            raise DivergedError(" and ".join(sorted(set(self.at.values()))))
        return first

    def fetch(self, path: str, read: Callable[[], Tensors]) -> Tensors:
        if self.arrive(path):
            self.held = {}  # the last module's go before these come
            try:
                self.held = read()
            except BaseException:
                self.barrier.abort()
                raise
        self.barrier.wait()
        return self.held


def run_together(
    component: Component, precision: str, calls: Sequence[Callable[[torch.nn.Module], Any]], wide: bool = False
) -> list[Any]:
    """Runs each call on a streamed module of its own, all in lockstep. Raises DivergedError where they part ways."""
    step = Lockstep(len(calls))
    modules = [streamed_module(component, precision, step.fetch, wide) for _ in calls]
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        torch.set_num_threads(1)  # of this thread: the runs are what goes in parallel
        try:
            results[i] = calls[i](modules[i])
            step.arrive("the end")
        except threading.BrokenBarrierError:
            pass  # another run failed and says why
        except BaseException as e:  # raised again below, in the caller's thread
            errors.append(e)
            step.barrier.abort()

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def groups_of(feeds: Sequence[Tensors]) -> Iterator[list[Tensors]]:
    """Runs that may be in memory together, in order."""
    group: list[Tensors] = []
    size = 0
    for feed in feeds:
        numbers = sum(t.numel() for t in feed.values())
        if group and size + numbers > TOGETHER:
            yield group
            group, size = [], 0
        group.append(feed)
        size += numbers
    if group:
        yield group
