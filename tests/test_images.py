"""Figures of images against their definitions, and feature networks: the demo's, a factory's, a folder's."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimize.errors import InputError
from optimize.profiles.features import digit_features, network_from_text, spatial
from optimize.profiles.images import image_figures
from optimize.quantize.texts import DIGITS

FACTORY = """
import torch

class Pixels(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)

    def logits(self, images):
        return 50 * images.flatten(1)

    def maps(self, images):
        return [images, 2 * images[:, :, ::2]]

def factory():
    return Pixels()

def broken():
    raise ValueError("no weights")

number = 3
"""


@pytest.fixture
def pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A network whose features are the pixels themselves, named as a user names it."""
    (tmp_path / "my_networks.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return network_from_text("my_networks:factory")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def real_digits(count: int) -> tuple[torch.Tensor, list[str]]:
    """`[count, 1, 32, 32]` of scikit-learn's digits in 0..1, and the prompts that would ask for them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images[:count]).float()[:, None] / 16
    images = torch.nn.functional.interpolate(small, size=32, mode="nearest")
    return images, [DIGITS[t] for t in digits.target[:count]]


def test_equal_images_are_perfect(pixels: torch.nn.Module) -> None:
    images = drawn(7, 1, 4, 4)
    found = image_figures(images, images, ["a"] * 7, pixels)
    assert (found.figures["image-psnr"], found.figures["image-ssim"], found.figures["lpips"]) == (math.inf, 1, 0)
    assert found.figures["fid"] == pytest.approx(0, abs=1e-6)
    for name in ("kid", "is"):  # torchmetrics shuffles: the last bits vary
        assert found.figures[name] == pytest.approx(found.reference[name], rel=1e-9), name
    assert set(found.skipped) == {"clip-score"}


def test_each_is_its_definition(pixels: torch.nn.Module) -> None:
    got, exact = drawn(63, 1, 3, 4), drawn(63, 1, 3, 4, seed=1) * 0.5 + 0.2
    found = image_figures(got, exact, ["a"] * 63, pixels).figures
    a, b = (t.flatten(1).double().numpy() for t in (got, exact))
    psnrs = -10 * np.log10(((a - b) ** 2).mean(1))
    assert found["image-psnr"] == pytest.approx(psnrs.mean())
    assert found["fid"] == pytest.approx(frechet(a, b), rel=1e-6)
    assert found["kid"] == pytest.approx(kernel_distance(a, b), rel=1e-5)
    logits = 50 * a
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    score = np.exp(np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(p.mean(0))), 0).sum(1).mean())
    assert found["is"] == pytest.approx(score, rel=1e-5)


def frechet(a: Any, b: Any) -> float:
    """|m - n|^2 + tr(S + T - 2 (S T)^(1/2))."""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(s @ t).real, 0))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * roots.sum())


def kernel_distance(a: Any, b: Any) -> float:
    """The unbiased squared maximum mean discrepancy under the kernel (x.y / d + 1)^3."""
    n, d = a.shape
    within = [((k := (t @ t.T / d + 1) ** 3).sum() - np.trace(k)) / (n * (n - 1)) for t in (a, b)]
    return float(sum(within) - 2 * ((a @ b.T / d + 1) ** 3).mean())


def test_lpips_is_the_distance_of_directions() -> None:
    class Maps(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

        def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [images, images]

    exact = torch.zeros(3, 2, 1, 1)
    exact[:, 0] = 1
    turned = torch.zeros(3, 2, 1, 1)
    turned[:, 1] = 0.25  # at right angles, whatever its length: a squared distance of 2 on each of two maps
    assert image_figures_of_lpips(Maps(), turned, exact) == pytest.approx(4)
    assert image_figures_of_lpips(Maps(), exact * 0.3, exact) == pytest.approx(0, abs=1e-12)


def image_figures_of_lpips(network: torch.nn.Module, got: torch.Tensor, exact: torch.Tensor) -> float:
    from optimize.profiles.images import lpips

    return lpips(network, got, exact, [])


def test_noise_shows_in_every_figure_of_the_demo() -> None:
    """The demo's own network on real digits: more noise, worse figures, fewer read; with none all are read right."""
    exact, prompts = real_digits(77)
    found = []
    for noise in (0.02, 0.1, 0.6):
        got = (exact + noise * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
        found.append(image_figures(got, exact, prompts, digit_features()))
    for name in ("image-psnr", "image-ssim"):
        assert found[0].figures[name] > found[1].figures[name] > found[2].figures[name], name
    for name in ("lpips", "fid", "kid"):
        assert found[0].figures[name] < found[1].figures[name] < found[2].figures[name], name
        assert found[0].reference[name] <= found[0].figures[name], name
    assert found[0].reference["read"] == 100 and found[2].figures["read"] < 100
    assert found[2].figures["points-lost"] == pytest.approx(100 - found[2].figures["read"])
    assert found[2].figures["is"] < found[0].figures["is"] < 10


def test_the_demos_features_are_of_size_one_and_its_logits_are_the_perceptrons() -> None:
    """Of 7 digits with 32 features FID is nothing and not below; KID's kernel stays near one."""
    images, prompts = real_digits(7)
    network = digit_features()
    assert float(network(real_digits(1797)[0]).square().mean()) == pytest.approx(1, abs=1e-4)
    assert [DIGITS[int(i)] for i in network.logits(images).argmax(1)] == prompts
    found = image_figures(images, images, prompts, network).figures
    assert 0 <= found["fid"] < 1e-5 and abs(found["kid"]) < 2


def test_the_demo_reads_what_it_is_asked_for() -> None:
    images, prompts = real_digits(50)
    wrong = [
        *prompts[:48],
        *("a handwritten zero" if p != "a handwritten zero" else "a handwritten one" for p in prompts[48:]),
    ]
    assert image_figures(images, images, wrong, None).figures["read"] == 96
    assert "read" not in image_figures(images, images, ["a cat"] * 50, None).figures


def test_without_a_network_each_figure_says_what_it_needs() -> None:
    found = image_figures(drawn(1, 3, 7, 9), drawn(1, 3, 7, 9), ["a"], None)
    assert set(found.figures) == {"image-psnr", "image-ssim"}
    assert set(found.skipped) == {"lpips", "fid", "kid", "is", "clip-score"}
    assert all("needs --features" in why for why in found.skipped.values())


def test_one_image_is_no_set(pixels: torch.nn.Module) -> None:
    found = image_figures(drawn(1, 1, 4, 4), drawn(1, 1, 4, 4, seed=1), ["a"], pixels)
    assert found.skipped["fid"] == found.skipped["kid"] == "needs two images"
    assert found.figures["lpips"] > 0


@pytest.mark.parametrize(
    "text",
    ["no_such_module:factory", "my_networks:missing", "my_networks:number", "my_networks:broken", "json", "", ":"],
)
def test_networks_that_are_none(text: str, pixels: torch.nn.Module) -> None:
    with pytest.raises(InputError, match="--features") as raised:
        network_from_text(text)
    assert "package.module:factory" in str(raised.value)
    assert ("--features failed" in str(raised.value)) == text.endswith("broken")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--features cannot be read"):
        network_from_text(str(tmp_path))


def test_clip_and_vit_from_folders(tmp_path: Path) -> None:
    """Tiny models with random weights: CLIP gives the CLIP score by its own embeddings, a classifier gives IS."""
    import transformers

    from optimize.compile.sources import demo_folder

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 586, "max_position_embeddings": 16, "bos_token_id": 584, "eos_token_id": 585}
    vision = {**small, "image_size": 32, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(tmp_path / "clip")
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        transformers.CLIPTokenizer.from_pretrained(demo_folder() / "tokenizer"),
    )
    processor.save_pretrained(tmp_path / "clip")
    got, exact, prompts = (
        drawn(5, 1, 32, 32),
        drawn(5, 1, 32, 32, seed=1),
        ["a cat", "one", "two", "nine", "a handwritten six"],
    )
    found = image_figures(got, exact, prompts, network_from_text(str(tmp_path / "clip")))
    assert set(found.skipped) == {"is"} and found.figures["lpips"] > 0 and found.figures["fid"] > 0
    pictures = [(t * 255).round().byte().expand(3, -1, -1) for t in got]
    inputs = processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
    with torch.inference_mode():
        out = model.eval()(**inputs)
    cosines = (out.image_embeds * out.text_embeds).sum(1)
    assert found.figures["clip-score"] == pytest.approx(max(100 * float(cosines.mean()), 0), abs=1e-3)

    labelled = transformers.ViTForImageClassification(transformers.ViTConfig(**vision, num_labels=5))
    labelled.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    network: Any = network_from_text(str(tmp_path / "vit"))
    assert network(got).shape == (5, 32) and network.logits(got).shape == (5, 5)
    assert [m.shape for m in network.maps(got)] == [(5, 32, 17, 1)] * 3
    assert set(image_figures(got, exact, prompts, network).skipped) == {"clip-score"}


def test_states_of_any_rank_are_maps() -> None:
    assert spatial(torch.zeros(2, 5)).shape == (2, 5, 1, 1)
    assert spatial(torch.zeros(2, 7, 5)).shape == (2, 5, 7, 1)
    assert spatial(torch.zeros(2, 5, 7, 3)).shape == (2, 5, 7, 3)
