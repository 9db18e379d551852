"""Figures of images drawn by an artifact beside those that the reference drew from the same prompts and seeds.

PSNR, SSIM and LPIPS compare image with image, FID and KID the two sets; IS, CLIP score and reading judge each set by
itself, so that the reference's figure stands beside. torchmetrics computes all but LPIPS, which there takes no network
of the user's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from optimize.quantize.measures import psnr, ssim
from optimize.quantize.texts import DIGITS

from .features import read_as_prompted
from .quality import mean

SIGNS: Mapping[str, str] = {
    "image-psnr": ">=",
    "image-ssim": ">=",
    "lpips": "<=",
    "fid": "<=",
    "kid": "<=",
    "is": ">=",
    "clip-score": ">=",
    "read": ">=",
    "points-lost": "<=",
}
"""Image figure -> which way it is better. `read` is the percentage of the demo's digits that a classifier reads as
prompted, `points-lost` how many percentage points fewer than of the reference's images."""
BATCH = 32  # images at once through a feature network


@dataclass(frozen=True)
class ImageFigures:
    """`figures` of the artifact's images; `reference` the same of the reference's own images, for figures that are not
    of image against image; `skipped` says of each figure that is not there why."""

    figures: dict[str, float] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def image_figures(
    got: torch.Tensor, exact: torch.Tensor, prompts: Sequence[str], network: torch.nn.Module | None
) -> ImageFigures:
    """All figures of `[n, c, h, w]` images in 0..1 that there are with this feature network (see `features`)."""
    result = ImageFigures()
    pairs = list(zip(got, exact, strict=True))
    result.figures["image-psnr"] = mean([psnr(a, b, span=1.0) for a, b in pairs])
    result.figures["image-ssim"] = fmean([ssim(a[None], b[None], span=1.0) for a, b in pairs])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchmetrics, about memory and about one split having no deviation
        for name, (needs, figure) in FROM_NETWORK.items():
            why = why_not(name, needs, network, len(got))
            if why is not None or network is None:
                result.skipped[name] = why or ""
                continue
            result.figures[name] = figure(network, got, exact, prompts)
            result.reference[name] = figure(network, exact, exact, prompts)
    if set(prompts) <= set(DIGITS):
        for side, images in ((result.figures, got), (result.reference, exact)):
            side["read"] = 100 * read_as_prompted(images, prompts) / len(images)
        result.figures["points-lost"] = result.reference["read"] - result.figures["read"]
    return result


def why_not(name: str, needs: str, network: torch.nn.Module | None, count: int) -> str | None:
    if network is None:
        return "needs --features, a network of yours (nothing is downloaded unasked)"
    if not hasattr(network, needs):
        return f"needs --features with a method `{needs}`"
    if name in ("fid", "kid") and count < 2:
        return "needs two images"
    return None


def batched(function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([function(part) for part in images.split(BATCH)])


class Given(torch.nn.Identity):
    """A feature network for torchmetrics when the features are there already."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.num_features = features.shape[1]


def fid(network: Any, got: torch.Tensor, exact: torch.Tensor, prompts: Sequence[str]) -> float:
    """Frechet distance of the two sets' features (Heusel et al. 2017), at least 0, which rounding takes it below where
    there are fewer images than features. The fewer images, the more too large."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = [batched(network, images).double() for images in (exact, got)]
    metric = FrechetInceptionDistance(feature=Given(features[0]), normalize=True)
    metric.update(features[0], real=True)
    metric.update(features[1], real=False)
    return max(float(metric.compute()), 0.0)


def kid(network: Any, got: torch.Tensor, exact: torch.Tensor, prompts: Sequence[str]) -> float:
    """Kernel distance of the two sets' features (Binkowski et al. 2018) over all images at once. The estimate is for
    independent sets and below zero for two of the same seeds: read it beside the reference's with itself."""
    from torchmetrics.image.kid import KernelInceptionDistance

    features = [batched(network, images).double() for images in (exact, got)]
    metric = KernelInceptionDistance(feature=Given(features[0]), subsets=1, subset_size=len(got))
    metric.update(features[0], real=True)
    metric.update(features[1], real=False)
    return float(metric.compute()[0])


def lpips(network: Any, got: torch.Tensor, exact: torch.Tensor, prompts: Sequence[str]) -> float:
    """Zhang et al. 2018, equation 1, over the network's own maps with every weight one: at each place the squared
    distance of the unit vectors along the channels, averaged over places, summed over maps, averaged over images."""
    with torch.inference_mode():
        found = [lpips_each(network, a, b) for a, b in zip(got.split(BATCH), exact.split(BATCH), strict=True)]
    return float(torch.cat(found).mean())


def lpips_each(network: Any, got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """One distance for each image."""
    total = torch.zeros(len(got), dtype=torch.float64)
    for maps in zip(network.maps(got), network.maps(exact), strict=True):
        a, b = (t.double() / (t.double().norm(dim=1, keepdim=True) + 1e-10) for t in maps)
        total += (a - b).square().sum(1).mean((1, 2))
    return total


def inception_score(network: Any, got: torch.Tensor, exact: torch.Tensor, prompts: Sequence[str]) -> float:
    """Salimans et al. 2016, over all images at once, from the network's logits."""
    from torchmetrics.image.inception import InceptionScore

    logits = batched(network.logits, got).double()
    metric = InceptionScore(feature=Given(logits), splits=1)
    metric.update(logits)
    return float(metric.compute()[0])


def clip_score(network: Any, got: torch.Tensor, exact: torch.Tensor, prompts: Sequence[str]) -> float:
    """Hessel et al. 2021: 100 times the cosine of image and prompt, averaged, at least 0."""
    from torchmetrics.multimodal import CLIPScore

    metric = CLIPScore(model_name_or_path=network.clip)
    for i in range(0, len(got), BATCH):
        pixels = (got[i : i + BATCH].clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1)
        with torch.inference_mode():
            metric.update(list(pixels), list(prompts[i : i + BATCH]))
    return float(metric.compute())


Figure = Callable[[Any, torch.Tensor, torch.Tensor, Sequence[str]], float]
FROM_NETWORK: Mapping[str, tuple[str, Figure]] = {
    "lpips": ("maps", lpips),
    "fid": ("forward", fid),
    "kid": ("forward", kid),
    "is": ("logits", inception_score),
    "clip-score": ("clip", clip_score),
}
"""Figure -> the method that it needs of the network, and what computes it."""
