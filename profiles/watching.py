"""`optimize.watch`: the time of a running pipeline by component, with nothing exported and nothing computed otherwise.

A watched callable is an attribute that an instance looks up in itself first: a VAE's `encode` and `decode`, and of
every other network torch's own slot for a compiled call, which lies around its hooks and its compiled code alike.
Clocks are read on the way in and out. On a CUDA device an event is put into the stream there, and all are read at the
end: the run itself waits for nothing.
"""

from __future__ import annotations

import functools
import gc
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch

from optimize.errors import InputError
from optimize.quantize.recording import modules_of

from .seen import Clock, Seen, Shapes, Span

CALL = "_compiled_call_impl"
"""What `module(...)` runs where it is set, hooks and all; `module.compile()` puts its compiled code there."""
METHODS = {"encode": "_encoder", "decode": "_decoder"}
"""Methods by which pipelines call a VAE, which is never called itself, and the ends of its components' names."""


def watch(what: Any) -> Watch:
    """Times the components of a diffusers pipeline, or of a mapping from names to torch modules, while it is used.

    `with optimize.watch(pipe) as seen: pipe("a prompt")`, then `print(seen)`, `seen.rows()` or `seen.as_pandas()`:
    calls, times, sizes and share of each network, and what is outside of them all (scheduler, tokenizers, copies).
    Results are untouched; after the block, and after an error in it, the pipeline is as it was and what was seen is
    kept. It is for pipelines that run in one thread. A network inside of another's compiled graph is not seen.
    Raises InputError for what is neither.
    """
    modules = networks_of(what)
    return Watch(type(what).__name__, tuple(modules), Clock(device_of(what, modules)), what=what)


def networks_of(what: Any) -> dict[str, torch.nn.Module]:
    modules = dict(what) if isinstance(what, Mapping) else modules_of(what)
    wrong = [type(m).__name__ for m in modules.values() if not isinstance(m, torch.nn.Module)]
    if wrong or not modules:
        raise InputError(
            "there is nothing to watch",
            got=wrong[0] if wrong else "no network",
            expected="a diffusers pipeline, or a mapping from names to torch modules",
            mend='such as optimize.watch({"unet": unet})',
        )
    return modules


def device_of(what: Any, modules: Mapping[str, torch.nn.Module]) -> torch.device:
    """Where it computes: what a pipeline says (offloaded parts lie elsewhere), or where the first CUDA weight is."""
    told = getattr(what, "_execution_device", None)
    found = (p.device for module in modules.values() for p in module.parameters())
    return torch.device(told or next((d for d in found if d.type == "cuda"), "cpu"))


# --- what is watched -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """`attribute` of `owner` is called for the component `part` of the module called `network`; `names` are those of
    its positional arguments."""

    part: str
    network: str
    owner: Any
    attribute: str
    names: tuple[str, ...]


def targets_of(modules: Mapping[str, torch.nn.Module]) -> list[Target]:
    """The ways into each network. One that has two names goes by the first."""
    found: dict[int, tuple[str, torch.nn.Module]] = {}
    for name, module in modules.items():
        found.setdefault(id(module), (name, module))
    targets = []
    for name, module in found.values():
        inner = getattr(module, "_orig_mod", module)  # torch.compile's wrapper hands all but calls to what it wraps
        targets.append(Target(name, name, module, CALL, names_of(type(inner).forward)))
        if all(callable(getattr(inner, method, None)) for method in METHODS):
            for method, suffix in METHODS.items():
                targets.append(Target(name + suffix, name, inner, method, names_of(getattr(type(inner), method))))
    return targets


def names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(n for n, p in inspect.signature(function).parameters.items() if p.kind in kinds)[1:]


def shapes_of(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shapes:
    """Shapes of a call's tensors by argument, with those in dicts (`added_cond_kwargs`) and the first one of a list."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for i, value in enumerate(args):
        add_shapes(shapes, names[i] if i < len(names) else f"argument {i}", value)
    for name, value in kwargs.items():
        add_shapes(shapes, name, value)
    return tuple(shapes)


def add_shapes(shapes: list[tuple[str, tuple[int, ...]]], name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        shapes.append((name, tuple(value.shape)))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            add_shapes(shapes, str(key), inner)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
        shapes.append((f"{name}[{len(value)}]", tuple(value[0].shape)))


@contextmanager
def replaced(owner: Any, attribute: str, function: Callable[..., Any]) -> Iterator[None]:
    """`owner.attribute` is `function` meanwhile. What somebody else put there since stays."""
    own = vars(owner)
    before = own.get(attribute)
    own[attribute] = function
    try:
        yield
    finally:
        if own.get(attribute) is function:
            own.pop(attribute) if before is None else own.update({attribute: before})


@contextmanager
def called_through(pipe: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """`pipe(...)` runs wrapped meanwhile. Calls are looked up in the class, so it has one of the same name for that."""
    cls = type(pipe)
    body = {"__call__": wrap(cls.__call__), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    watched = types.new_class(cls.__name__, (cls,), exec_body=lambda own: own.update(body))
    pipe.__class__ = watched
    try:
        yield
    finally:
        if type(pipe) is watched:
            pipe.__class__ = cls


@contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Garbage collection looks at what is made meanwhile alone. Over all that diffusers and transformers have loaded it
    takes 0.2 to 0.4 s (seen), in whichever component it falls."""
    if gc.get_freeze_count():  # somebody else's, who will undo it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass
class Watch(Seen):
    """What `watch` gives: a context manager that tells afterwards, or within, what it has seen."""

    what: Any = None
    _open: list[Span] = field(default_factory=list, repr=False)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> Self:
        self.spans.clear()
        with ExitStack() as stack:
            stack.enter_context(old_objects_left_alone())
            for target in targets_of(networks_of(self.what)):
                inner = getattr(target.owner, target.attribute) or target.owner._call_impl
                stack.enter_context(replaced(target.owner, target.attribute, self._timed(inner, target)))
            if not isinstance(self.what, Mapping):
                stack.enter_context(called_through(self.what, self._timed))
            self._stack = stack.pop_all()
        self.block = (self.clock.mark(), None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.block is not None:
            self.block = (self.block[0], self.clock.mark())
        self._open.clear()
        self._stack.close()

    def _timed(self, inner: Callable[..., Any], target: Target | None = None) -> Callable[..., Any]:
        """`inner`, its calls kept as those of the target, or as runs of the pipeline."""
        part, network, names = (target.part, target.network, target.names) if target else (None, None, ())

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            shapes = shapes_of(names, args, kwargs) if target else ()
            span = Span(part, network, self._open[-1] if self._open else None, shapes, self.clock.mark())
            self._open.append(span)
            self.spans.append(span)
            try:
                return inner(*args, **kwargs)
            except BaseException:
                span.raised = True
                raise
            finally:
                span.end = self.clock.mark()
                if self._open and self._open[-1] is span:
                    self._open.pop()

        return call
