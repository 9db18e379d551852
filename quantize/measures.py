"""How near one tensor is to another: cosine, SNR, PSNR and SSIM, in float64.

A value that is not a number makes every figure NaN, and NaN meets no budget. Infinities that agree (a mask's) are no
difference and are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from optimize.errors import InputError, MissingError


def cosine(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The cosine of the angle between two tensors of equal shape, each taken as one vector: -1 to 1.

    Two vectors of zeros are equal (1); a vector of zeros and another one have nothing in common (0).
    Raises InputError where the shapes differ.
    """
    a, b = _vectors(got, exact)
    sizes = float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b))
    if 0.0 in sizes:
        return math.nan if any(math.isnan(s) for s in sizes) else float(sizes[0] == sizes[1])
    value = float(a / sizes[0] @ (b / sizes[1]))
    return value if math.isnan(value) else min(max(value, -1.0), 1.0)


def snr(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal-to-noise ratio in dB: 10 log10 of the energy of `exact` over that of the difference.

    Infinite where nothing differs, also for empty tensors. Raises InputError where the shapes differ.
    """
    a, b = _vectors(got, exact)
    return _decibels(float(b @ b), float((a - b) @ (a - b)))


def psnr(got: torch.Tensor, exact: torch.Tensor, span: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10 of span^2 over the mean squared difference.

    `span` is the range that values can take (2 for images in -1..1); without it, that of `exact`, largest less
    smallest. Infinite where nothing differs. Raises InputError where the shapes differ.
    """
    a, b = _vectors(got, exact)
    if not len(b):
        return math.inf
    span = float(b.max() - b.min()) if span is None else span
    return _decibels(span**2, float(((a - b) ** 2).mean()))


def ssim(got: torch.Tensor, exact: torch.Tensor, span: float | None = None) -> float:
    """Structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004, section III) of `[n, c, height, width]`, at most
    1, averaged over every place of every image, edges mirrored; torchmetrics computes it.

    The window is the paper's Gaussian of 11 by 11 with a deviation of 1.5; where the images are smaller than that, the
    largest odd window that fits, its deviation in proportion. `span` is as in `psnr`.

    Raises InputError for tensors that are no images or are below 3 by 3, and MissingError without torchmetrics.
    """
    _same_shape(got, exact)
    if exact.ndim != 4 or min(exact.shape[-2:]) < 3 or not exact.numel():
        raise InputError(
            "SSIM needs images", got=f"shape {list(exact.shape)}", expected="[n, c, height, width], at least 3 by 3"
        )
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as e:
        raise MissingError("SSIM is computed by torchmetrics", mend='pip install "optimize[quality]"') from e
    a, b = got.detach().double(), exact.detach().double()
    if torch.equal(a, b):
        return 1.0  # of constant images too, whose span is nothing
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    span = float(b.max() - b.min()) if span is None else span
    half = min(5, (min(exact.shape[-2:]) - 1) // 2)
    # torchmetrics draws the Gaussian's window from its deviation: 2 * int(3.5 * deviation + 0.5) + 1
    value = structural_similarity_index_measure(a, b, sigma=1.5 * half / 5, data_range=span or 1.0)
    return float(value)


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal / noise > 0 else -math.inf


def _same_shape(got: torch.Tensor, exact: torch.Tensor) -> None:
    if got.shape != exact.shape:
        raise InputError(
            "tensors of different shapes cannot be compared", got=list(got.shape), expected=list(exact.shape)
        )


def _vectors(got: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as float64 vectors, with infinities that agree as zeros."""
    _same_shape(got, exact)
    a, b = (t.detach().double().reshape(-1) for t in (got, exact))
    agreed = (a == b) & a.isinf()
    return a.masked_fill(agreed, 0.0), b.masked_fill(agreed, 0.0)


# --- budgets ---------------------------------------------------------------------------------------------------------

MEASURES: Mapping[str, Callable[..., float]] = {"cosine": cosine, "snr": snr, "psnr": psnr, "ssim": ssim}
"""Figure name -> what computes it. More is better in all of them."""


@dataclass(frozen=True)
class Budget:
    """`figure` has to be at least `limit` (`sign` ">="), or at most ("<="). NaN meets no budget."""

    figure: str
    sign: str
    limit: float

    def met(self, value: float) -> bool:
        return value >= self.limit if self.sign == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.figure}{self.sign}{self.limit:.10g}"


def budget_from_text(text: str, signs: Mapping[str, str] = dict.fromkeys(MEASURES, ">=")) -> Budget:
    """`cosine>=0.999` becomes a Budget; `signs` are the figures that there are, and which way each is better.

    Raises InputError for other words, other figures, and a sign that would ask for something bad.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(>=|<=)\s*(\S+)\s*", text)
    try:
        figure, sign, limit = match.group(1), match.group(2), float(match.group(3))  # type: ignore[union-attr]
    except (AttributeError, ValueError) as e:
        raise InputError(
            "--budget was not understood", got=text, expected="FIGURE>=NUMBER", mend="such as --budget 'cosine>=0.999'"
        ) from e
    if signs.get(figure) != sign or math.isnan(limit):
        raise InputError(
            "--budget asks for something that is not measured",
            got=text,
            expected=", ".join(f"{f}{s}..." for f, s in signs.items()),
        )
    return Budget(figure, sign, limit)
