"""Feature networks for image figures: what the user names, or the demo's own, fitted to scikit-learn's real digits.

A feature network is a torch module: images `[n, channels, height, width]` in 0..1 become features `[n, size]` (FID,
KID). What else it can do are further methods: `logits(images) -> [n, classes]` (IS), `maps(images) -> [[n, c, h, w],
...]` (LPIPS), `clip() -> (model, processor)` (CLIP score), `read(images) -> [n]` digits. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from optimize.errors import InputError, MissingError
from optimize.quantize.texts import DIGITS

HOW = "a folder of a transformers vision model, or package.module:factory that gives a torch module"


def network_from_text(text: str) -> torch.nn.Module:
    """`--features`: a folder, or `module:factory`, whose code runs. Raises InputError for anything else."""
    if Path(text).is_dir():
        return TransformersFeatures(Path(text))
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` would
    try:
        made = made_by(text)
    finally:
        sys.path.pop(0)
    if not isinstance(made, torch.nn.Module):
        raise InputError("--features gives no torch module", got=f"{text}: {type(made).__name__}", expected=HOW)
    return made.eval()


def made_by(text: str) -> Any:
    """What `module:factory` gives. Its code is the user's and raises whatever it does."""
    module, _, name = text.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name) if name else None
    except Exception as e:
        why = f"{text}: {type(e).__name__}: {e}"
        raise InputError("--features names nothing that is there", got=why, expected=HOW) from e
    try:
        return factory() if callable(factory) else factory
    except Exception as e:
        why = f"{text}: {type(e).__name__}: {e}"
        raise InputError("--features failed", got=why, expected=HOW, mend="run the factory by itself") from e


class TransformersFeatures(torch.nn.Module):
    """A vision model in a folder that save_pretrained wrote: CLIP, ViT, ResNet, ConvNeXt, ...

    Features are CLIP's image embeddings, else the pooled output, else the mean over places; maps are all hidden states.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

        try:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
            labelled = any("ForImageClassification" in name for name in config.architectures or [])
            kind = AutoModelForImageClassification if labelled else AutoModel
            self.model = kind.from_pretrained(str(folder), local_files_only=True, use_safetensors=True).eval()
            self.processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
        except Exception as e:  # transformers and safetensors raise whatever their parts do
            raise InputError("--features cannot be read", got=f"{folder}: {e}", expected=HOW) from e
        self.folder, self.labelled, self.is_clip = folder, labelled, config.model_type == "clip"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = self.called(images)
        if self.is_clip:
            embedded: torch.Tensor = self.model.visual_projection(out.pooler_output)
            return embedded
        pooled = getattr(out, "pooler_output", None)
        return spatial(out.hidden_states[-1] if pooled is None else pooled).mean((2, 3))

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [spatial(h) for h in self.called(images).hidden_states]

    def __getattr__(self, name: str) -> Any:
        """`logits` and `clip` where the model has them, so that asking shows whether it does."""
        if name == "logits" and self.labelled:
            return lambda images: self.called(images).logits
        if name == "clip" and self.is_clip:
            return self._clip
        return super().__getattr__(name)

    def called(self, images: torch.Tensor) -> Any:
        from PIL import Image

        pixels = (images.clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        inputs = self.processor(images=[Image.fromarray(p) for p in pixels], return_tensors="pt")
        network = self.model.vision_model if self.is_clip else self.model
        with torch.inference_mode():
            return network(pixel_values=inputs["pixel_values"], output_hidden_states=True)

    def _clip(self) -> tuple[Any, Any]:
        from transformers import AutoProcessor

        return ClipEmbeddings(self.model), AutoProcessor.from_pretrained(str(self.folder), local_files_only=True)


class ClipEmbeddings(torch.nn.Module):
    """CLIP as torchmetrics 1.9 calls it: the embeddings themselves, which transformers 5 gives inside an object."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device

    def get_image_features(self, *inputs: torch.Tensor) -> Any:
        out = self.model.get_image_features(*inputs)
        return getattr(out, "pooler_output", out)

    def get_text_features(self, *inputs: torch.Tensor) -> Any:
        out = self.model.get_text_features(*inputs)
        return getattr(out, "pooler_output", out)


def spatial(states: torch.Tensor) -> torch.Tensor:
    """`[n, c]`, `[n, tokens, c]` and `[n, c, h, w]` as `[n, c, h, w]`."""
    if states.ndim == 3:
        states = states.transpose(1, 2)
    return states[(...,) + (None,) * (4 - states.ndim)]


# --- the demo's ------------------------------------------------------------------------------------------------------


class DigitFeatures(torch.nn.Module):
    """Fitted in seconds to scikit-learn's 1797 real digits of 8 by 8: a perceptron for features and logits, principal
    components of patches for maps (PCANet: Chan et al. 2015), and the support vector machine that reads digits."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from sklearn.datasets import load_digits
            from sklearn.decomposition import PCA
            from sklearn.neural_network import MLPClassifier
            from sklearn.svm import SVC
        except ImportError as e:
            raise MissingError(
                "the demo's classifier needs scikit-learn", mend='pip install "optimize[quality]", or --features'
            ) from e
        digits = load_digits()
        self.reader = SVC(gamma=0.001, C=10).fit(digits.data, digits.target)
        fitted = MLPClassifier((64, 32), random_state=0, max_iter=200, tol=1e-3).fit(digits.data / 16, digits.target)
        self.layers = [
            (torch.from_numpy(w.T).float(), torch.from_numpy(b).float())
            for w, b in zip(fitted.coefs_, fitted.intercepts_, strict=True)
        ]
        pictures = torch.from_numpy(digits.images).float()[:, None] / 16
        self.scale = 1.0
        self.scale = float(self(pictures).square().mean().sqrt())
        patches = F.unfold(pictures, 3).transpose(1, 2).reshape(-1, 9).numpy()
        self.filters = torch.from_numpy(PCA(8, random_state=0).fit(patches).components_).float().reshape(8, 1, 3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The perceptron's last hidden layer, `[n, 32]`, of mean square one: KID cubes products of them."""
        x = small(images).flatten(1)
        for weight, bias in self.layers[:-1]:
            x = F.linear(x, weight, bias).relu()
        return x / self.scale

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return F.linear(self(images) * self.scale, *self.layers[-1])

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Responses of the patches' components at three scales, and a constant: a flat background has a direction."""
        found = [F.conv2d(F.avg_pool2d(images, k), self.filters, padding=1) for k in (1, 2, 4)]
        return [F.pad(m, (0, 0, 0, 0, 0, 1), value=1.0) for m in found]

    def read(self, images: torch.Tensor) -> list[int]:
        return [int(d) for d in self.reader.predict((small(images) * 16).flatten(1).numpy())]


@cache
def digit_features() -> DigitFeatures:
    return DigitFeatures()


def small(images: torch.Tensor) -> torch.Tensor:
    """`[n, 1, height, width]` as the 8 by 8 of scikit-learn's digits."""
    return F.adaptive_avg_pool2d(images.float(), 8)


def read_as_prompted(images: torch.Tensor, prompts: Sequence[str]) -> int:
    """How many of the images the demo's classifier of real digits reads as their prompts (of `DIGITS`) say."""
    read = digit_features().read(images)
    return sum(DIGITS[digit] == prompt for digit, prompt in zip(read, prompts, strict=True))
