"""What a component is, as plain data: axes, tensors, precisions. Reading this needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError

if TYPE_CHECKING:
    from .weights import Weights

LARGEST = 2**31 - 1  # of any axis
FLOAT = "float"  # stands for the component's own precision in a TensorSpec

PRECISIONS: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precision name on the command line -> name of the torch (and NumPy / ml_dtypes) type."""
QUANTIZED = ("int8", "int8-dynamic", "int8-weight", "fp8", "int4-weight")
"""Precisions that are made of another one's graph; what they are stands in `optimize.quantize.schemes`."""


@dataclass(frozen=True)
class Axis:
    """One size that may vary. Values lie in `min..max` and are multiples of `step`; `min == max` makes it static.

    `limit` is the most that the model can take, where there is such a thing (a table of positions).
    """

    name: str
    min: int
    opt: int
    max: int
    step: int = 1
    limit: int | None = None

    @property
    def static(self) -> bool:
        return self.min == self.max

    def __post_init__(self) -> None:
        if not (0 <= self.min <= self.opt <= self.max):
            raise InputError(
                f"axis {self.name}: the sizes are not in order",
                got=f"{self.min}:{self.opt}:{self.max}",
                expected="0 <= min <= opt <= max",
                mend=f"--axis {self.name}={self.min}:{max(self.min, self.opt)}:{max(self.min, self.opt, self.max)}",
            )
        most = LARGEST - LARGEST % self.step if self.limit is None else self.limit
        if self.max > most:
            raise InputError(
                f"axis {self.name}: the model cannot take {self.max}",
                got=self.max,
                expected=f"at most {most}",
                mend=f"--axis {self.name}={min(self.min, most)}:{min(self.opt, most)}:{most}",
            )
        for value in (self.min, self.opt, self.max):
            if value % self.step:
                low = max(value // self.step, 1) * self.step
                raise InputError(
                    f"axis {self.name}: the model cannot take {value}",
                    got=value,
                    expected=f"a multiple of {self.step}",
                    mend=f"use {low} or {low + self.step}",
                )

    def __str__(self) -> str:
        return str(self.min) if self.static else f"{self.min}:{self.opt}:{self.max}"


def axis_from_text(text: str, axes: Mapping[str, Axis]) -> Axis:
    """`NAME=VALUE` (static) or `NAME=MIN:OPT:MAX` becomes an Axis; the step is that of the model's own axis."""
    match = re.fullmatch(r"(\w+)=(\d+)(?::(\d+):(\d+))?", text.strip(), re.ASCII)
    if not match:
        raise InputError(
            "--axis was not understood",
            got=text,
            expected="NAME=SIZE or NAME=MIN:OPT:MAX, in whole numbers",
            mend="such as --axis batch=1:1:8, or --axis height=512",
        )
    name, low, opt, high = match.groups()
    if name not in axes:
        raise InputError(
            f"unknown axis {name}",
            got=text,
            expected="one of " + ", ".join(sorted(axes)),
            mend="`--dry-run` shows the axes of each component",
        )
    if int(low) == 0 < axes[name].min:
        raise InputError(
            f"axis {name}: the model cannot take 0",
            got=text,
            expected=f"at least {axes[name].step}",
            mend=f"use {axes[name].step} or more",
        )
    return replace(axes[name], min=int(low), opt=int(opt or low), max=int(high or low))


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor. `dtype` is "float" (the precision), or a fixed type such as "int64" or "float32".

    Each entry of `shape` is an int, or a sum of `axis` or `axis/divisor` terms: "batch", "height/8", "past+tokens".
    `fill` names how sample data for it are made (see `compile.feeds`): "normal", "timestep", "ids:1000", "ones", ...
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = FLOAT
    fill: str = "normal"

    def torch_dtype(self, precision: str) -> str:
        """Name of the torch type of this tensor in a component of that precision."""
        return PRECISIONS[precision] if self.dtype == FLOAT else self.dtype

    def sizes(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers, with `values` giving a size for each axis."""
        return tuple(d if isinstance(d, int) else size_of(d, values) for d in self.shape)

    def axis_names(self) -> list[str]:
        return [name for dim in self.shape if isinstance(dim, str) for name, _ in dim_terms(dim)]


def dim_terms(dim: str) -> list[tuple[str, int]]:
    """`"past+height/8"` -> `[("past", 1), ("height", 8)]`."""
    terms = [term.partition("/") for term in dim.split("+")]
    return [(name, int(divisor or 1)) for name, _, divisor in terms]


def size_of(dim: str, values: Mapping[str, int]) -> int:
    return sum(values[name] // divisor for name, divisor in dim_terms(dim))


@dataclass(frozen=True)
class Component:
    """One network of a model: pure data beside the factory `build`.

    `build()` returns the torch module in eval mode, its parameters on meta and its buffers real where no checkpoint
    holds them; its `forward` takes the tensors of `inputs` in order and returns a tuple of those of `outputs`.
    With `kernels` its graphs are written with our own operators (`optimize.kernels`); eager stays as it is.
    """

    name: str
    role: str
    class_name: str
    axes: Mapping[str, Axis]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    build: Callable[[], Any]
    weights: Weights
    config: Mapping[str, Any]
    kernels: bool = False

    @staticmethod
    def from_module(
        module: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[str],
        axes: Sequence[Axis] = (),
        *,
        name: str = "model",
        role: str = "module",
    ) -> Component:
        """A component of your own torch module: what a `python:` factory returns.

        `inputs` are the arguments of `module.forward` in order; its result is a tensor or a tuple of them, named by
        `outputs`. Sizes that vary are axes: `TensorSpec("x", ("batch", 16))` with `Axis("batch", 1, 1, 8)`.
        """
        from .weights import component_of_module

        return component_of_module(module, tuple(inputs), tuple(outputs), {a.name: a for a in axes}, name, role)

    def with_axes(self, changes: Mapping[str, Axis]) -> Component:
        known = {k: v for k, v in changes.items() if k in self.axes}
        return replace(self, axes={**self.axes, **known})

    def shape_sets(self) -> dict[str, dict[str, int]]:
        """Axis sizes for tracing and proof: `traced`, `untraced` (no multiple of it) and `smallest`.

        The traced sizes are small, pairwise different and above one, so that nothing specialises by accident; they
        are unrelated to `opt`, which tunes engines.
        """
        traced, untraced, smallest = {}, {}, {}
        for i, axis in enumerate(self.axes.values()):
            traced[axis.name] = _pick(axis, (2, 3, 4, 7, 11, 13)[min(i, 5)])
            untraced[axis.name] = _pick(axis, (3, 2, 3, 5, 6, 17)[min(i, 5)])
            smallest[axis.name] = axis.min
            if untraced[axis.name] == traced[axis.name] and not axis.static:
                untraced[axis.name] = axis.min
        return {"traced": traced, "untraced": untraced, "smallest": smallest}


def _pick(axis: Axis, units: int) -> int:
    """`units` steps above nothing, or above one less than the smallest size where that is more, within the range."""
    size = axis.step * units
    return min(size if size >= axis.min else axis.min + axis.step * (units - 1), axis.max)
