"""Whether feeds fit a component: names, types, ranks, sizes within its axes, finite numbers, ids of its vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from optimize.compile.runners import Feeds
from optimize.compile.spec import Axis, TensorSpec, dim_terms, size_of
from optimize.errors import InputError

IDS = ("ids", "clip", "types")
"""Fills of inputs that are places in a table: `ids:1000` has rows 0 to 999."""


def cast_feeds(inputs: Sequence[TensorSpec], feeds: Feeds) -> dict[str, torch.Tensor]:
    """The feeds in the types of the fp32 component, contiguous. Floats become floats, whole numbers whole numbers.

    Raises InputError for other names and for a type of another kind.
    """
    names = [t.name for t in inputs]
    if set(feeds) != set(names):
        wrong = [f"no {n}" for n in names if n not in feeds] + [f"{n} is not one" for n in feeds if n not in names]
        raise InputError(
            "the feeds are not the component's inputs",
            got=", ".join(wrong),
            expected=", ".join(names),
            mend="name each array as the input that it is for",
        )
    made = {}
    for spec in inputs:
        tensor, dtype = feeds[spec.name], getattr(torch, spec.torch_dtype("fp32"))
        if kind_of(tensor.dtype) != kind_of(dtype):
            raise InputError(
                f"{spec.name} is of another kind of number",
                got=name_of(tensor.dtype),
                expected=f"{kind_of(dtype)}, such as {name_of(dtype)}",
                mend="convert it: floats and whole numbers mean different things",
            )
        made[spec.name] = tensor.to(dtype).contiguous()
    return made


def kind_of(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "a float"
    return "truth values" if dtype == torch.bool else "complex numbers" if dtype.is_complex else "whole numbers"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sizes_of(inputs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Axis -> its size, read from the shapes of those inputs that have one in `shapes`.

    A dim of one axis (`height/8`) gives that axis; one of several (`past+tokens`) is checked against them.
    Raises InputError for a wrong rank, a wrong fixed dim, and sizes that disagree between inputs.
    """
    sizes: dict[str, int] = {}
    where: dict[str, str] = {}
    for spec, i, dim, got in dims_of(inputs, shapes):
        terms = dim_terms(dim) if isinstance(dim, str) else []
        if len(terms) == 1:
            (name, divisor) = terms[0]
            if sizes.setdefault(name, got * divisor) != got * divisor:
                raise InputError(
                    f"{spec.name} does not agree with {where[name]} about {name}",
                    got=f"{name} {got * divisor} (dim {i})",
                    expected=f"{name} {sizes[name]}",
                    mend="the inputs of one sample belong together",
                )
            where.setdefault(name, spec.name)
    for spec, i, dim, got in dims_of(inputs, shapes):
        if isinstance(dim, str) and any(name not in sizes for name, _ in dim_terms(dim)):
            continue
        wanted = dim if isinstance(dim, int) else size_of(dim, sizes)
        if got != wanted:
            raise InputError(
                f"{spec.name} has a wrong size in dim {i}",
                got=list(shapes[spec.name]),
                expected=f"{wanted} ({dim})" if isinstance(dim, str) else wanted,
                mend=f"the component takes [{', '.join(map(str, spec.shape))}]",
            )
    return sizes


def dims_of(
    inputs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[TensorSpec, int, int | str, int]]:
    for spec in inputs:
        if spec.name not in shapes:
            continue
        shape = shapes[spec.name]
        if len(shape) != len(spec.shape):
            raise InputError(
                f"{spec.name} has a wrong number of dims",
                got=list(shape),
                expected=f"{len(spec.shape)} dims: [{', '.join(map(str, spec.shape))}]",
                mend="one sample is what the component takes at once, its batch included",
            )
        yield from ((spec, i, dim, got) for i, (dim, got) in enumerate(zip(spec.shape, shape, strict=True)))


def check_axes(sizes: Mapping[str, int], axes: Mapping[str, Axis]) -> None:
    """Raises InputError for a size outside its axis, or between its steps."""
    for name, size in sizes.items():
        axis = axes.get(name)
        if axis is None or (axis.min <= size <= axis.max and size % axis.step == 0):
            continue
        steps = f" in steps of {axis.step}" if axis.step > 1 else ""
        raise InputError(
            f"{name} is {size}, which the component does not take",
            got=size,
            expected=f"{axis.min} to {axis.max}{steps}",
            mend=f"give samples of such a size, or --axis {name}=MIN:OPT:MAX that holds theirs",
        )


def check_numbers(inputs: Sequence[TensorSpec], feeds: Feeds) -> None:
    """Raises InputError for what is not finite, and for ids that the model's table does not have."""
    for spec in inputs:
        tensor = feeds[spec.name]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{spec.name} is not finite",
                got=f"{bad} of {tensor.numel()} numbers are NaN or infinite",
                expected="finite numbers, in fp32 too",
                mend="look at how the data were made",
            )
        kind, _, most = spec.fill.partition(":")
        tokens = kind in IDS and len(spec.shape) > 1 and tensor.numel()  # DiT's labels have one more: no class
        if tokens and not (tensor.min() >= 0 and tensor.max() < int(most)):
            raise InputError(
                f"{spec.name} has ids that the model does not know",
                got=f"{int(tensor.min())} to {int(tensor.max())}",
                expected=f"0 to {int(most) - 1}",
                mend="tokenize with the model's own tokenizer",
            )


def check_feeds(inputs: Sequence[TensorSpec], axes: Mapping[str, Axis], feeds: Feeds) -> dict[str, torch.Tensor]:
    """One sample in the component's types. Raises InputError where it does not fit."""
    made = cast_feeds(inputs, feeds)
    check_axes(sizes_of(inputs, {n: t.shape for n, t in made.items()}), axes)
    check_numbers(inputs, made)
    return made


def split_batch(
    inputs: Sequence[TensorSpec], axes: Mapping[str, Axis], feeds: Feeds
) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """(rows, feeds) of at most the largest batch that the component takes; inputs without a batch go with each."""
    batch = next((feeds[t.name].shape[0] for t in inputs if t.shape[:1] == ("batch",)), 0)
    most = axes["batch"].max if "batch" in axes else batch
    if batch <= most:
        return [(f"0:{batch}", dict(feeds))]
    batched = {t.name for t in inputs if t.shape[:1] == ("batch",)}
    starts = range(0, batch, most)
    return [
        (f"{i}:{min(i + most, batch)}", {n: t[i : i + most] if n in batched else t for n, t in feeds.items()})
        for i in starts
    ]
