"""Feeds as they pass by: hooks on the networks of a running diffusers pipeline, and what each call means to us.

A call's arguments become the named inputs of our component by the names and shapes that the component declares; what
differs by role is in `TAPS`, and arguments that change nothing about the feeds are in `HARMLESS`.
"""

from __future__ import annotations

import contextlib
import inspect
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from optimize.compile.adapters import Adapter, adapters_for
from optimize.compile.runners import Feeds
from optimize.compile.sources import pipeline_facts
from optimize.compile.spec import Axis, Component, TensorSpec
from optimize.errors import InputError

from .fit import check_feeds, sizes_of, split_batch
from .sets import CalibrationSet, SetWriter, read_about, read_set

DENOISERS = ("unet", "dit", "controlnet")


@dataclass(frozen=True)
class Tap:
    """Where in its module a component's feeds pass by: the first of `parts` that is there (nothing: the module itself).

    Of a part, its one argument is taken, or with `output` what it gives, within -1 to 1: an image that could come back.
    """

    parts: tuple[str, ...] = ("",)
    output: bool = False


WHOLE = (Tap(),)
TAPS: Mapping[str, tuple[Tap, ...]] = {
    "vae_decoder": (Tap(("post_quant_conv", "decoder")),),
    "vae_encoder": (Tap(("encoder",)), Tap(("decoder",), output=True)),
}
"""Role -> where its feeds pass by, if not at the module's own call. A VAE is never called itself in a pipeline, and a
text-to-image pipeline has no image but those that it decodes."""

HARMLESS = ("return_dict", "output_hidden_states", "output_attentions", "use_cache", "conditioning_scale")
"""Arguments that are not inputs of ours and change nothing of what flows in."""

ABSENT: Mapping[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "mask": torch.ones,
    "types": torch.zeros,
    "zeros": torch.zeros,
}
"""Fill of an input that a call left out -> what the module takes it to be."""


@dataclass(frozen=True)
class Site:
    """A component of a pipeline: its name, what it takes, and the module that is called."""

    name: str
    role: str
    inputs: tuple[TensorSpec, ...]
    axes: Mapping[str, Axis]
    module: torch.nn.Module


def sites_of_pipeline(pipe: Any) -> list[Site]:
    """Every network of a pipeline that we have components of, with the axes that they have by default."""
    configs = {part: config_of(module) for part, module in modules_of(pipe).items()}
    facts = pipeline_facts(configs)
    sites = []
    for part, module in modules_of(pipe).items():
        with contextlib.suppress(InputError):  # a network that is not served has no inputs that we could name
            for adapter in adapters_for(type(module).__name__):
                sites.append(site_of(part, module, adapter, {**configs[part], **facts}))
    return sites


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Part -> module of a pipeline, in its own order."""
    parts = getattr(pipe, "components", None)
    if not isinstance(parts, Mapping):
        raise InputError(
            "this is no diffusers pipeline",
            got=type(pipe).__name__,
            expected="an object with .components, as DiffusionPipeline.from_pretrained gives",
            mend="give the pipeline itself",
        )
    return {part: module for part, module in parts.items() if isinstance(module, torch.nn.Module)}


def config_of(module: torch.nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", {})
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def site_of(part: str, module: torch.nn.Module, adapter: Adapter, config: Mapping[str, Any]) -> Site:
    io = adapter.io(config)
    return Site(part + adapter.suffix, adapter.role, io.inputs, {a.name: a for a in io.axes}, module)


def site_of_component(component: Component, pipe: Any) -> Site:
    """The same of a component that a source gave, with its own axes."""
    parts = modules_of(pipe)
    part = component.name if component.name in parts else component.name.rpartition("_")[0]
    if part not in parts:
        raise InputError(
            f"the pipeline has no {component.name}",
            got=", ".join(parts),
            expected="one of its networks",
            mend="name a component that `optimize export SOURCE --out DIR --dry-run` lists",
        )
    return Site(component.name, component.role, component.inputs, component.axes, parts[part])


def chosen_sites(sites: Sequence[Site], names: Sequence[str]) -> list[Site]:
    """Those of these names, or all. Raises InputError for an unknown one."""
    known = [s.name for s in sites]
    for name in names:
        if name not in known:
            raise InputError(
                f"the pipeline has no component {name}",
                got=name,
                expected="one of " + ", ".join(known),
                mend="leave it out to record all",
            )
    return [s for s in sites if s.name in names or not names]


# --- a call's arguments become feeds ----------------------------------------------------------------------------------


def arguments_of(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the class's own forward, `added_cond_kwargs` among the others."""
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs).arguments
    bound.pop(next(iter(signature.parameters)), None)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
        elif name in bound and same(bound[name], parameter.default):
            del bound[name]
    bound.update(bound.pop("added_cond_kwargs", None) or {})
    return dict(bound)


def same(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, torch.Tensor) and bool(value == default))


def feeds_from_call(
    inputs: Sequence[TensorSpec], values: Mapping[str, Any], device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """The component's feeds from a call's arguments by name, on the device in fp32's types.

    One number for all rows becomes one per row, a leading one more than the component has is dropped, and what was
    left out becomes what the module takes it for. Raises InputError for a call that means more than the inputs say.
    """
    names = {t.name for t in inputs}
    more = [n for n, v in values.items() if n not in names and n not in HARMLESS and not says_nothing(n, v)]
    if more:
        raise InputError(
            "the network was called with more than the component takes",
            got=", ".join(more),
            expected=", ".join(names),
        )
    given: dict[str, torch.Tensor] = {}
    for spec in inputs:
        value = values.get(spec.name)
        if value is not None:
            tensor = torch.as_tensor(value).detach().to(device)
            one_more = tensor.dim() == len(spec.shape) + 1 and tensor.shape[0] == 1
            given[spec.name] = tensor[0] if one_more else tensor
        elif kind_of_fill(spec) not in ABSENT:
            raise InputError("the network was called without one of the component's inputs", got=f"no {spec.name}")
    per_row = {t.name for t in inputs if t.shape == ("batch",) and t.name in given and given[t.name].numel() == 1}
    sizes = sizes_of(inputs, {n: t.shape for n, t in given.items() if n not in per_row})
    made = {}
    for spec in inputs:
        shape = spec.sizes({"batch": 1, **sizes})
        tensor = given[spec.name] if spec.name in given else ABSENT[kind_of_fill(spec)](shape)
        tensor = tensor.reshape(1).expand(shape) if spec.name in per_row else tensor
        made[spec.name] = tensor.to(device, getattr(torch, spec.torch_dtype("fp32"))).contiguous()
    return made


def kind_of_fill(spec: TensorSpec) -> str:
    return spec.fill.partition(":")[0]


def says_nothing(name: str, value: Any) -> bool:
    """Whether an argument is as good as left out: nothing, an empty dict, a mask of ones."""
    if isinstance(value, torch.Tensor):
        return name.endswith("mask") and bool((value == 1).all())
    return value is None or value is False or (isinstance(value, Mapping) and all(v is None for v in value.values()))


# --- hooks ------------------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Hooks on the sites' modules while the `with` block runs; each call that `keep(site, n)` wants is written.

    A batch larger than the component's is split; with `one_part` one of its parts is taken, another one each time.
    `note` goes to every sample beside the call's number, its rows and its timestep. `left_out` says of a component
    what could not be recorded, and why. Nothing that the pipeline computes is touched.
    """

    sites: Sequence[Site]
    writers: Mapping[str, SetWriter]
    keep: Callable[[Site, int], bool]
    one_part: bool = False
    note: dict[str, Any] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Self:
        for site in self.sites:
            for tap in TAPS.get(site.role, WHOLE):
                part = next(p for p in tap.parts if not p or getattr(site.module, p, None) is not None)
                module = site.module.get_submodule(part)
                if tap.output:
                    self._handles.append(module.register_forward_hook(partial(self._gave, site)))
                else:
                    hook = partial(self._called, site, bool(part))
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _called(self, site: Site, is_part: bool, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if is_part:
            self._take(site, lambda: {site.inputs[0].name: args[0]})
        else:
            self._take(site, lambda: arguments_of(module, args, kwargs))

    def _gave(self, site: Site, module: torch.nn.Module, args: Any, output: Any) -> None:
        image = output[0] if isinstance(output, tuple) else output
        self._take(site, lambda: {site.inputs[0].name: image.clamp(-1, 1)})

    def _take(self, site: Site, values: Callable[[], Mapping[str, Any]]) -> None:
        call = self.calls[site.name]
        self.calls[site.name] += 1
        writer = self.writers[site.name]
        if writer.full or not self.keep(site, call):
            return
        try:
            feeds = feeds_from_call(site.inputs, values())
            parts = split_batch(site.inputs, site.axes, feeds)
            parts = [parts[(self.note.get("run", 0) + call) % len(parts)]] if self.one_part else parts
            for rows, part in parts:
                note = {**self.note, "call": call, "rows": rows, **timestep_of(part)}
                writer.add(check_feeds(site.inputs, site.axes, part), note)
        except InputError as e:
            self.left_out.setdefault(site.name, f"{e.what} ({e.got})")
        except (TypeError, ValueError) as e:  # an argument that is no tensor; the run is the user's and goes on
            self.left_out.setdefault(site.name, f"its arguments were not understood ({e})")


class Recording:
    """`with optimize.record(pipe, folder) as recording: pipe(...)`: a set per component, of every Nth of its calls.

    The sets are there when the block has ended without an error: `recording.sets`. Of a component that has none
    `recording.left_out` says why.
    """

    def __init__(self, pipe: Any, folder: Path, components: Sequence[str] = (), every: int = 1) -> None:
        self.folder, self.asked = folder, tuple(components)
        self.name = type(pipe).__name__
        self.sites = chosen_sites(sites_of_pipeline(pipe), components)
        self.sets: dict[str, CalibrationSet] = {}
        self.left_out: dict[str, str] = {}
        if every < 1:
            raise InputError("every how many calls?", got=every, expected="1 or more", mend="every=1 takes all")
        if not self.sites:
            raise InputError(f"{self.name} has no network that is served", mend="`optimize.record` needs one")
        for site in self.sites:
            check_new(folder / site.name)
        self._every = every
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        key = {"way": "recorded", "by": uuid.uuid4().hex}  # what an interrupted one left is of no other run's making
        with ExitStack() as stack:
            self._writers = {
                s.name: stack.enter_context(SetWriter(self.folder / s.name, s.name, key)) for s in self.sites
            }
            recorder = Recorder(self.sites, self._writers, lambda _, call: call % self._every == 0)
            self._recorder = stack.enter_context(recorder)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.how = f"recorded from {self.name}, {counted(writer.notes)}"
        self._stack.__exit__(kind, error, trace)
        if kind is not None:
            return
        self.sets = {n: read_set(self.folder / n, n) for n, w in self._writers.items() if w.notes}
        told = self._recorder.left_out
        self.left_out = {
            n: told.get(n, "it was never called") for n in self._writers if n in told or n not in self.sets
        }
        if lost := [n for n in self.asked if n not in self.sets]:
            raise InputError(
                f"nothing was recorded of {lost[0]}",
                got=self.left_out[lost[0]],
                expected="calls that its component can take",
                mend="run the pipeline in the with block, or leave the component out",
            )


def counted(samples: Sequence[object]) -> str:
    return f"{len(samples)} sample{'s' * (len(samples) != 1)}"


def check_new(folder: Path) -> None:
    """Raises InputError for a folder with a finished set, which nobody asked to replace."""
    if (read_about(folder) or {}).get("complete"):
        raise InputError(
            f"{folder} has a finished calibration set",
            got="a set",
            expected="a new folder",
            mend="name another folder, or delete this one",
        )


def timestep_of(feeds: Feeds) -> dict[str, float]:
    return {"timestep": float(feeds["timestep"][0])} if "timestep" in feeds and feeds["timestep"].numel() else {}
