"""How good an artifact is beside another one on identical inputs: cosine, SNR, PSNR, SSIM, by output and by timestep.

Only one network is in memory at a time: the reference's outputs wait on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch

from optimize.compile.runners import Runner
from optimize.quantize.measures import MEASURES

PICTURES = ("unet", "dit", "vae_encoder", "vae_decoder", "generator")
"""Roles whose outputs `[n, c, h, w]` are images or latents; a cache of keys has four dimensions, too."""
BINS = 10  # rows of a table by timestep

Tensors = Mapping[str, torch.Tensor]
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Quality:
    """One output of one artifact: each figure's mean over the samples and its worst, and the means by timestep.

    PSNR's span is that of each sample's reference. A sample that agrees in every bit is infinitely many dB away from
    noise and stays out of a mean, unless all do.
    """

    output: str
    samples: int
    figures: Figures
    worst: Figures
    by_timestep: Mapping[str, Figures] = field(default_factory=dict)


def keep_outputs(runner: Runner, samples: Iterable[Tensors], folder: Path) -> None:
    """The runner's outputs on every sample, a file each."""
    from safetensors.torch import save_file

    with runner:
        for i, feeds in enumerate(samples):
            outputs = runner.infer(feeds)
            save_file({n: t.clone().contiguous() for n, t in outputs.items()}, folder / f"{i:04}.safetensors")


def qualities(runner: Runner, samples: Iterable[Tensors], folder: Path, role: str) -> list[Quality]:
    """The runner's outputs beside those that `keep_outputs` left in `folder` for the same samples."""
    from safetensors.torch import load_file

    found: dict[str, list[Figures]] = {}
    times: list[float | None] = []
    with runner:
        for i, feeds in enumerate(samples):
            exact, got = load_file(folder / f"{i:04}.safetensors"), runner.infer(feeds)
            times.append(timestep_of(feeds))
            for name, tensor in exact.items():
                found.setdefault(name, []).append(figures_of(got[name], tensor, role))
    return [quality_of(name, figures, times) for name, figures in found.items()]


def figures_of(got: torch.Tensor, exact: torch.Tensor, role: str) -> dict[str, float]:
    """Every figure that there is for such a tensor."""
    picture = role in PICTURES and exact.ndim == 4 and min(exact.shape) > 0 and min(exact.shape[-2:]) >= 3
    return {name: measure(got, exact) for name, measure in MEASURES.items() if picture or name != "ssim"}


def timestep_of(feeds: Tensors) -> float | None:
    """The timestep of a sample, where it has one and all its rows share it."""
    times = feeds["timestep"].reshape(-1).tolist() if "timestep" in feeds else []
    return float(times[0]) if times and len(set(times)) == 1 else None


def quality_of(output: str, figures: Sequence[Figures], times: Sequence[float | None]) -> Quality:
    return Quality(
        output=output,
        samples=len(figures),
        figures=means(figures),
        worst={name: worst(f[name] for f in figures) for name in common(figures)},
        by_timestep=by_timestep(figures, times),
    )


def means(figures: Sequence[Figures]) -> dict[str, float]:
    return {name: mean([f[name] for f in figures]) for name in common(figures)}


def common(figures: Sequence[Figures]) -> list[str]:
    """Names that every sample has a figure for."""
    return [name for name in figures[0] if all(name in f for f in figures)]


def mean(values: Sequence[float]) -> float:
    """Without what is infinitely good, unless that is all there is."""
    return fmean([v for v in values if v != math.inf] or [math.inf])


def worst(values: Iterable[float]) -> float:
    """The least; NaN where there is one."""
    return min(values, key=lambda v: (not math.isnan(v), v))


def by_timestep(figures: Sequence[Figures], times: Sequence[float | None]) -> dict[str, dict[str, float]]:
    """Means for each timestep, latest (noisiest) first; for each of `BINS` ranges where there are more of them."""
    known = sorted({t for t in times if t is not None}, reverse=True)
    if len(known) < 2:
        return {}
    size = math.ceil(len(known) / BINS)
    rows = {}
    for group in (known[i : i + size] for i in range(0, len(known), size)):
        chosen = [f for f, t in zip(figures, times, strict=True) if t in group]
        rows["-".join(f"{t:g}" for t in dict.fromkeys((group[-1], group[0])))] = means(chosen)
    return rows
