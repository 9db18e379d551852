"""Where a component's weights come from: read one tensor at a time, never all of them at once.

Every kind answers the same four questions: which names, what type and shape, the tensor itself, and one digest of all.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from optimize.errors import InputError

from .digests import digest_of_file

if TYPE_CHECKING:
    import torch

    from .spec import Axis, Component, TensorSpec


class Weights(Protocol):
    """Named tensors of a component, by the names of its module's parameters and buffers."""

    @property
    def kind(self) -> str: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor on the CPU in the source's own type. The caller drops it before asking for the next."""
        ...

    def bind(self, module: torch.nn.Module) -> Weights:
        """These weights under the names of `module`; raises InputError for missing ones and wrong shapes."""
        ...

    def digest(self) -> str:
        """One digest of all that the weights depend on."""
        ...


def wanted(module: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """The persistent parameters and buffers of a module: what a checkpoint has to hold, tied names once each."""
    return module.state_dict(keep_vars=True)


# --- safetensors files -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SafetensorsWeights:
    """Weights in one or more safetensors files. `where` maps a module's name to (file, key in it)."""

    files: tuple[Path, ...]
    where: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    kind: str = "safetensors"

    @cached_property
    def headers(self) -> dict[str, tuple[Path, list[int], str]]:
        """Key -> (file, shape, type) of every tensor in the files; reads the headers only."""
        found = {}
        for path in self.files:
            for key, entry in header_of_safetensors(path).items():
                found[key] = (path, entry["shape"], entry["dtype"])
        return found

    def tensor(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        path, key = self.where[name]
        # opened anew each time: a mapping that stays open counts every page ever read as this process's memory
        with safe_open(path, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def bind(self, module: torch.nn.Module) -> SafetensorsWeights:
        shapes = {key: shape for key, (_, shape, _) in self.headers.items()}
        keys = matched(module, shapes, ", ".join(f.name for f in self.files))
        for name, tensor in wanted(module).items():
            check_kind(name, self.headers[keys[name]][2].startswith(("I", "U")), tensor, self.headers[keys[name]][2])
        return SafetensorsWeights(self.files, {name: (self.headers[key][0], key) for name, key in keys.items()})

    def digest(self) -> str:
        parts = [digest_of_file(path) for path in self.files]
        return "sha256:" + hashlib.sha256("".join(parts).encode()).hexdigest()


def matched(module: torch.nn.Module, shapes: Mapping[str, Sequence[int]], where: str) -> dict[str, str]:
    """Name in the module -> key among `shapes` (what `where` holds). Raises InputError for missing and wrong ones."""
    names = wanted(module)
    keys = {name: name for name in shapes}
    if not keys.keys() >= names.keys():
        keys = {**{new: old for old, new in key_renames(module, shapes)}, **keys}
    found, missing = {}, []
    for name, tensor in names.items():
        key = next((keys[n] for n in alternatives(module, name) if n in keys), None)
        if key is None:
            missing.append(name)
            continue
        if [d for d in shapes[key] if d != 1] != [d for d in tensor.shape if d != 1]:
            raise InputError(
                f"weight {name} has a wrong shape in {where}",
                got=list(shapes[key]),
                expected=list(tensor.shape),
                mend="the config and the weights are of different models: take both from the same folder",
            )
        found[name] = key
    if missing:
        raise InputError(
            f"{len(missing)} weights are missing in {where}",
            got="no " + ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else ""),
            expected=f"all {len(names)} tensors of {type(module).__name__}",
            mend="download the folder again, or check that config.json belongs to these weights",
        )
    return found


def check_kind(name: str, whole: bool, tensor: torch.Tensor, dtype: str) -> None:
    """Raises InputError for whole numbers where the model has fractions: a quantized checkpoint."""
    if whole and tensor.is_floating_point():
        raise InputError(
            f"weight {name} is stored in whole numbers",
            got=dtype,
            expected=str(tensor.dtype),
            mend="a quantized checkpoint is not a source: take the weights that it was made from",
        )


def header_of_safetensors(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor entries of a safetensors file (dtype, shape, data_offsets). Raises InputError where it is broken."""
    from safetensors import SafetensorError, safe_open

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, 100 << 20):
                raise ValueError("its header is longer than the file")
            header = dict(json.loads(file.read(length)))
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        if 8 + length + end == size:
            with safe_open(path, framework="np"):
                pass  # every type, shape and offset is checked
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as e:
        raise InputError(
            f"{path.name} is not a readable safetensors file",
            got=str(e)[:300] or type(e).__name__,
            expected="a header that describes its tensors, then their data",
            mend="fetch it again",
        ) from e
    if 8 + length + end != size:
        raise InputError(
            f"{path.name} is truncated or has been changed",
            got=f"{size} bytes",
            expected=f"{8 + length + end} bytes by its own header",
            mend="fetch it again",
        )
    return header


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def key_renames(module: torch.nn.Module, keys: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key in the file, name in the module): the renames that the libraries' own loaders apply."""
    if not hasattr(module, "base_model_prefix"):
        pattern = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")
        for key in keys:
            yield key, pattern.sub(lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.{m[3]}", key)
        return
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(module)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    names = dict(wanted(module))
    for key in keys:
        new, converted = rename_source_key(key, renamings, converters, module.base_model_prefix, names)
        if converted is None:
            yield key, new


def alternatives(module: torch.nn.Module, name: str) -> Iterator[str]:
    """The name itself, then the names that it is tied to (`lm_head.weight` = the embedding)."""
    yield name
    tied = getattr(module, "_tied_weights_keys", None) or {}
    if isinstance(tied, Mapping):
        yield from (source for target, source in tied.items() if re.fullmatch(target, name))
    me = wanted(module).get(name)
    yield from (n for n, t in wanted(module).items() if t is me and n != name)


# --- random and in-memory weights ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomWeights:
    """Weights made from a seed and each tensor's own name, so that any of them can be made alone, again, the same."""

    seed: int = 0
    shapes: Mapping[str, tuple[tuple[int, ...], Any]] = field(default_factory=dict)
    kind: str = "random"

    def tensor(self, name: str) -> torch.Tensor:
        import torch

        shape, dtype = self.shapes[name]
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8], "little")
        generator = torch.Generator().manual_seed(seed & (2**63 - 1))
        noise = torch.empty(shape).normal_(generator=generator)
        if len(shape) < 2:  # norms' scales lie around one, everything else around zero: neither can hide a mistake
            around_one = name.endswith(("weight", "running_var")) or "scale" in name
            return noise.mul_(0.1).add_(1.0 if around_one else 0.0).to(dtype)
        fan_in = math.prod(shape[1:]) if "embed" not in name or "proj" in name or "linear" in name else 1
        return noise.mul_(0.02 if fan_in == 1 else 1 / math.sqrt(fan_in)).to(dtype)

    def bind(self, module: torch.nn.Module) -> RandomWeights:
        return RandomWeights(self.seed, {n: (tuple(t.shape), t.dtype) for n, t in wanted(module).items()})

    def digest(self) -> str:
        return f"random:{self.seed}"


@dataclass(frozen=True)
class MemoryWeights:
    """Weights that somebody's code already holds: `load()` gives the state dict, called at most once."""

    load: Callable[[], Mapping[str, torch.Tensor]]
    where: Mapping[str, str] = field(default_factory=dict)
    kind: str = "memory"

    @cached_property
    def state(self) -> Mapping[str, torch.Tensor]:
        return self.load()

    def tensor(self, name: str) -> torch.Tensor:
        return self.state[self.where.get(name, name)].detach().cpu()

    def bind(self, module: torch.nn.Module) -> MemoryWeights:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        keys = matched(module, shapes, "the state dict")
        for name, tensor in wanted(module).items():
            held = self.state[keys[name]]
            check_kind(name, not (held.is_floating_point() or held.is_complex()), tensor, str(held.dtype))
        return MemoryWeights(lambda: self.state, keys)

    def digest(self) -> str:
        import torch

        sha = hashlib.sha256()
        for name in sorted(self.state):
            tensor = self.state[name].detach().cpu().contiguous()
            sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        return "sha256:" + sha.hexdigest()


def component_of_module(
    module: torch.nn.Module,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[str, ...],
    axes: Mapping[str, Axis],
    name: str,
    role: str,
) -> Component:
    """A component of a module that is in memory: its weights stay where they are, copies on meta are traced."""
    import copy

    from .adapters import plain_forward
    from .spec import Component
    from .trace import with_forward

    held = module.eval().requires_grad_(False)

    def build() -> torch.nn.Module:
        # parameters are replaced by meta ones before copying: the copy costs no memory
        memo = {id(p): p.detach().to("meta").requires_grad_(False) for p in held.parameters()}
        memo = {i: torch.nn.Parameter(p, requires_grad=False) for i, p in memo.items()}
        return with_forward(copy.deepcopy(held, memo), plain_forward)

    import torch

    check_inputs(inputs, axes)
    config = {"module": identity(held, inputs, outputs)}
    return Component(
        name, role, type(module).__name__, axes, inputs, outputs, build, MemoryWeights(held.state_dict), config
    )


def identity(module: torch.nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> str:
    """A digest of what a module computes beside its weights: the source of its classes, their plain attributes,
    buffers that are not saved, and what goes in and comes out."""
    import inspect
    from dataclasses import asdict

    def source_of(cls: type) -> str:
        try:
            return inspect.getsource(cls)
        except (OSError, TypeError):  # written at a prompt
            return repr(cls)

    def is_plain(value: Any) -> bool:
        if isinstance(value, tuple | list):
            return all(map(is_plain, value))
        return value is None or isinstance(value, bool | int | float | str)

    classes = {c for m in module.modules() for c in type(m).__mro__}
    own = sorted(source_of(c) for c in classes if c.__module__.partition(".")[0] not in ("torch", "builtins"))
    plain = {
        path: {k: repr(v) for k, v in sorted(vars(m).items()) if is_plain(v)} for path, m in module.named_modules()
    }
    saved = set(module.state_dict())
    rest = MemoryWeights(lambda: {n: b for n, b in module.named_buffers() if n not in saved}).digest()
    told = [own, plain, rest, [asdict(t) for t in inputs], list(outputs)]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:16]


def check_inputs(inputs: Sequence[TensorSpec], axes: Mapping[str, Axis]) -> None:
    """Raises InputError for an input of an unknown type or fill, or with an axis that was not declared."""
    import torch

    from .feeds import FILLS

    for t in inputs:
        if t.dtype != "float" and not isinstance(getattr(torch, t.dtype, None), torch.dtype):
            raise InputError(f"input {t.name} has no such type", got=t.dtype, expected="float, or torch's, as int64")
        if t.fill.partition(":")[0] not in FILLS:
            raise InputError(f"input {t.name} has no such fill", got=t.fill, expected="one of " + ", ".join(FILLS))
        if lost := [name for name in t.axis_names() if name not in axes]:
            raise InputError(
                f"input {t.name} has an axis that is not declared",
                got=", ".join(lost),
                expected="one of " + (", ".join(axes) or "none"),
                mend=f'add Axis("{lost[0]}", MIN, OPT, MAX), or give the size as a number',
            )
