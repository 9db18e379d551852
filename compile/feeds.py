"""Sample data for a component's inputs: right in kind (token ids, masks, timesteps), seeded, the same everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .spec import TensorSpec

Sizes = Mapping[str, int]


def _normal(shape: tuple[int, ...], rng: torch.Generator, *_: Any) -> torch.Tensor:
    return torch.randn(shape, generator=rng)


def _ids(shape: tuple[int, ...], rng: torch.Generator, sizes: Sizes, argument: str) -> torch.Tensor:
    return torch.randint(0, int(argument), shape, generator=rng)


def _clip(shape: tuple[int, ...], rng: torch.Generator, sizes: Sizes, argument: str) -> torch.Tensor:
    """A prompt: words, then the end token (the highest id, which CLIP pools at) up to the end, at a place per row."""
    last = int(argument) - 1
    ids = torch.randint(0, max(last - 1, 1), shape, generator=rng)
    for row in ids:
        row[int(torch.randint(1, shape[1] + 1, (), generator=rng)) :] = last
    return ids


def _mask(shape: tuple[int, ...], rng: torch.Generator, sizes: Sizes, *_: Any) -> torch.Tensor:
    """Ones with zeros where text is padded: at the end for encoders, at the start, within the past, for decoders."""
    mask = torch.ones(shape)
    for i, row in enumerate(mask):
        if "past" in sizes:
            row[: int(torch.randint(0, sizes["past"] + 1, (), generator=rng)) if i else 0] = 0
        else:
            row[int(torch.randint(1, shape[1] + 1, (), generator=rng)) :] = 0
    return mask


def _after(shape: tuple[int, ...], rng: torch.Generator, sizes: Sizes, argument: str) -> torch.Tensor:
    return (torch.arange(shape[1]) + sizes[argument]).expand(shape)


def _positions(shape: tuple[int, ...], *_: Any) -> torch.Tensor:
    """FLUX's image ids: (0, row, column) of each latent patch of a nearly square image."""
    width = max(1, int(shape[0] ** 0.5))
    index = torch.arange(shape[0])
    return torch.stack([index * 0, index // width, index % width], dim=1)


def _size(shape: tuple[int, ...], *_: Any) -> torch.Tensor:
    """SDXL's original size, crop and target size; the refiner's last one is an aesthetic score."""
    return torch.tensor([512, 512, 0, 0, 512, 512] if shape[1] == 6 else [512, 512, 0, 0, 6]).expand(shape)


def _unit(shape: tuple[int, ...], rng: torch.Generator, *_: Any) -> torch.Tensor:
    """A timestep from 1 down to 1/32, a power of two: models multiply it by 1000 in their own precision, and bf16 holds
    those products exactly. Of any other, eager's own rounding of the sines' arguments (58 % of FLUX's output) would be
    all that parity compares with."""
    return 0.5 ** torch.randint(0, 6, shape, generator=rng).float()


FILLS: Mapping[str, Callable[..., torch.Tensor]] = {
    "normal": _normal,
    "timestep": lambda shape, rng, *_: torch.randint(0, 1000, shape, generator=rng),
    "unit": _unit,
    "guidance": lambda shape, *_: torch.full(shape, 4.0),
    "zeros": lambda shape, *_: torch.zeros(shape),
    "ids": _ids,
    "types": _ids,
    "clip": _clip,
    "mask": _mask,
    "after": _after,
    "positions": _positions,
    "size": _size,
}


def feeds_for(inputs: tuple[TensorSpec, ...], sizes: Sizes, precision: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """One tensor per input at these axis sizes, floats in the component's precision."""
    feeds = {}
    for spec in inputs:
        kind, _, argument = spec.fill.partition(":")
        digest = hashlib.sha256(f"{seed}:{spec.name}:{sorted(sizes.items())}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        tensor = FILLS[kind](spec.sizes(sizes), rng, sizes, argument)
        if spec.dtype == "bool" and kind == "normal":
            tensor = tensor > 0
            if tensor.ndim and tensor.shape[-1]:
                tensor[..., 0] = True  # a row of a mask that is all closed means nothing
        feeds[spec.name] = tensor.to(getattr(torch, spec.torch_dtype(precision))).contiguous()
    return feeds
