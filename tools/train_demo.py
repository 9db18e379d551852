"""Trains the demonstration pipeline: a small text-to-image latent diffusion model of handwritten digits.

The folder it writes is an ordinary diffusers folder that ``StableDiffusionPipeline.from_pretrained`` loads as is, with
every part that a large one has (CLIP tokenizer and text encoder, cross-attention U-Net, KL autoencoder, DDIM), in under
6 MB of real trained weights. An export that is wrong can therefore be seen to be wrong: a classifier that was trained
on real digits reads the pictures, and ``record.json`` says how often it reads the digit that the prompt names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{}", "a {}", "the {}", "digit {}", "the digit {}", "a digit {}", "number {}", "the number {}", "handwritten {}",
    "a handwritten {}", "a handwritten digit {}", "the handwritten digit {}", "a picture of a {}",
    "a picture of the number {}", "a drawing of the digit {}", "a photo of a handwritten {}",
    "please write the number {}", "{}, written by hand",
)  # fmt: skip
UNSEEN_TEMPLATES = ("a drawing of a handwritten {}", "please write a {}", "a photo of the digit {}, written by hand")


@dataclass(frozen=True)
class Knobs:
    """Everything that shapes the run; it goes into the record as it stands."""

    seed: int = 0
    threads: int = 2
    image_size: int = 32
    held_out: float = 0.2
    prompt_tokens: int = 16
    text_width: int = 64
    text_layers: int = 2
    vae_channels: tuple[int, ...] = (16, 32, 32)
    unet_channels: tuple[int, ...] = (32, 64)
    head_dim: int = 32
    norm_groups: int = 8
    vae_steps: int = 300
    vae_batch: int = 48
    vae_rate: float = 3e-3
    kl_weight: float = 1e-4
    unet_steps: int = 2000
    unet_batch: int = 64
    unet_rate: float = 2e-3
    prompt_drop: float = 0.1
    sampler_steps: int = 25
    guidance: float = 3.0
    samples_per_digit: int = 20
    samples_per_batch: int = 50
    required: float = 0.9
    most_bytes: int = 6_000_000


class Denoiser(nn.Module):
    """Text encoder and U-Net as one module, so that one optimiser and one moving average cover both."""

    def __init__(self, text_encoder: nn.Module, unet: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
        """Latents (B, 4, 8, 8), timesteps (B,) and token ids (B, L) give the prediction, (B, 4, 8, 8).

        No padding mask: StableDiffusionPipeline passes none either.
        """
        states = self.text_encoder(tokens).last_hidden_state
        prediction: Tensor = self.unet(noisy, steps, encoder_hidden_states=states).sample
        return prediction


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load_images(size: int) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """The 1797 digits as images (N, 1, size, size) in [-1, 1], and their labels (N,)."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    return F.interpolate(small, size=size, mode="bicubic").clamp(-1, 1), digits.target


def features(images: Tensor) -> np.ndarray[Any, Any]:
    """What the classifier reads of images (N, 1, H, W): their averages over an 8x8 grid, (N, 64)."""
    pooled: np.ndarray[Any, Any] = F.adaptive_avg_pool2d(images, 8).flatten(1).numpy()
    return pooled


def prompts_of(digit: int, templates: tuple[str, ...]) -> list[str]:
    """Every template with the digit as a word and as a numeral: "the digit seven", "the digit 7"."""
    return [template.format(form) for template in templates for form in (WORDS[digit], str(digit))]


def build_tokenizer(knobs: Knobs) -> Any:
    """A CLIPTokenizer whose merges make every word of the templates one token.

    The vocabulary is laid out as CLIP's own is: all bytes, all bytes at a word's end, the merges, then start and end.
    So no prompt, however odd, meets an unknown token.
    """
    merger = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    merger.normalizer = normalizers.Lowercase()
    merger.pre_tokenizer = pre_tokenizers.Whitespace()
    corpus = [prompt for digit in range(10) for prompt in prompts_of(digit, TEMPLATES)]
    merger.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>"))
    merges = [tuple(merge) for merge in json.loads(merger.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=knobs.prompt_tokens)


def token_ids(tokenizer: Any, prompts: list[str]) -> Tensor:
    """The ids (N, L) of the prompts, padded as StableDiffusionPipeline pads them."""
    ids: Tensor = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def build_text_encoder(knobs: Knobs, tokenizer: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=knobs.prompt_tokens, num_hidden_layers=knobs.text_layers,
        hidden_size=knobs.text_width, intermediate_size=4 * knobs.text_width, projection_dim=knobs.text_width,
        num_attention_heads=knobs.text_width // knobs.head_dim, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def build_vae(knobs: Knobs) -> Any:
    levels = len(knobs.vae_channels)
    return AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, sample_size=knobs.image_size, layers_per_block=1,
        block_out_channels=knobs.vae_channels, norm_num_groups=knobs.norm_groups,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    )  # fmt: skip


def build_unet(knobs: Knobs) -> Any:
    """As in Stable Diffusion, the lowest resolution has no attention of its own; the middle block has."""
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, sample_size=knobs.image_size // 4, layers_per_block=1,
        block_out_channels=knobs.unet_channels, norm_num_groups=knobs.norm_groups,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        # diffusers' name is wrong for this class: the value is the number of heads of each level
        attention_head_dim=tuple(width // knobs.head_dim for width in knobs.unet_channels),
        cross_attention_dim=knobs.text_width,
    )  # fmt: skip


def build_scheduler() -> Any:
    """DDIM with Stable Diffusion's betas; v-prediction, which a small model learns in fewer steps than the noise."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def batches(count: int, size: int, steps: int, dice: torch.Generator) -> Iterator[Tensor]:
    """`steps` index tensors (size,), drawn from one reshuffled pass over `count` items after another."""
    deck = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(deck) < size:
            deck = torch.cat([deck, torch.randperm(count, generator=dice)])
        yield deck[:size]
        deck = deck[size:]


def fit(
    name: str, model: nn.Module, rate: float, work: list[Tensor], loss_of: Callable[[Tensor], Tensor]
) -> tuple[nn.Module, dict[str, Any]]:
    """Takes one AdamW step per batch of indices in `work`; gives the weights' moving average and the record's lines.

    The average reaches back over a twentieth of the steps, so that nothing of the first weights is left in it. A loss
    in the record is the mean over a tenth of the steps, for single ones are noisy.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=len(work) + 1, pct_start=0.05)
    blend = get_ema_multi_avg_fn(1 - 20 / max(20, len(work)))
    average = AveragedModel(model, multi_avg_fn=blend)
    began, losses = time.perf_counter(), []
    for chosen in work:
        loss = loss_of(chosen)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.item())
        if len(losses) % 100 == 0 or len(losses) == len(work):
            say(f"{name}: step {len(losses)}/{len(work)}, loss {losses[-1]:.4f}, {time.perf_counter() - began:.0f} s")
    tenth = max(1, len(losses) // 10)
    lines = {
        "steps": len(losses),
        "seconds": round(time.perf_counter() - began, 1),
        "first_loss": round(float(np.mean(losses[:tenth])), 5),
        "last_loss": round(float(np.mean(losses[-tenth:])), 5),
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }
    return average.module.eval().requires_grad_(False), lines


def train_vae(knobs: Knobs, images: Tensor, dice: torch.Generator) -> tuple[Any, dict[str, Any]]:
    """An autoencoder for images (N, 1, H, W): squared error, plus a light pull of the latents to a unit normal."""
    vae = build_vae(knobs)

    def loss_of(chosen: Tensor) -> Tensor:
        batch = images[chosen]
        latents = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(latents.sample(generator=dice)).sample, batch)
        loss: Tensor = error + knobs.kl_weight * latents.kl().mean() / latents.mean[0].numel()
        return loss

    work = list(batches(len(images), knobs.vae_batch, knobs.vae_steps, dice))
    return fit("vae", vae, knobs.vae_rate, work, loss_of)


@torch.no_grad()
def encode(vae: Any, images: Tensor, dice: torch.Generator) -> Tensor:
    """Scaled latents (N, 4, 8, 8) of images (N, 1, H, W); sets the scaling factor that makes their deviation one."""
    latents = torch.cat([vae.encode(part).latent_dist.sample(generator=dice) for part in torch.split(images, 200)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled


@torch.no_grad()
def reconstruction_error(vae: Any, images: Tensor) -> float:
    """Root mean square over the pixels (their range is 2) of images (N, 1, H, W) once encoded and decoded."""
    error = vae.decode(vae.encode(images).latent_dist.mode()).sample - images
    return round(float(error.square().mean().sqrt()), 5)


def train_denoiser(
    knobs: Knobs, tokenizer: Any, latents: Tensor, labels: list[int], dice: torch.Generator
) -> tuple[Any, dict[str, Any]]:
    """Text encoder and U-Net for latents (N, 4, 8, 8) and their digits (N,).

    A tenth of the prompts are replaced by the empty one, which the pipeline's classifier-free guidance needs.
    """
    scheduler = build_scheduler()
    model = Denoiser(build_text_encoder(knobs, tokenizer), build_unet(knobs))
    empty = token_ids(tokenizer, [""])[0]
    prompts = torch.stack([token_ids(tokenizer, prompts_of(digit, TEMPLATES)) for digit in range(10)])[labels]

    def loss_of(chosen: Tensor) -> Tensor:
        clean, count = latents[chosen], len(chosen)
        noise = torch.randn(clean.shape, generator=dice)
        steps = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=dice)
        tokens = prompts[chosen, torch.randint(prompts.shape[1], (count,), generator=dice)]
        tokens[torch.rand(count, generator=dice) < knobs.prompt_drop] = empty
        guess = model(scheduler.add_noise(clean, noise, steps), steps, tokens)
        return F.mse_loss(guess, scheduler.get_velocity(clean, noise, steps))

    work = list(batches(len(latents), knobs.unet_batch, knobs.unet_steps, dice))
    return fit("unet", model, knobs.unet_rate, work, loss_of)


def evaluation_prompts(knobs: Knobs) -> list[tuple[str, int]]:
    """Prompts and the digits they name; they go through all templates, those that training did not see among them."""
    pairs = []
    for digit in range(10):
        known = prompts_of(digit, UNSEEN_TEMPLATES + TEMPLATES)
        pairs += [(known[(7 * place) % len(known)], digit) for place in range(knobs.samples_per_digit)]
    return pairs


def evaluate(knobs: Knobs, folder: Path, classifier: Any) -> dict[str, Any]:
    """Samples with the pipeline as a user would, from the folder, and counts the digits that the classifier reads.

    Picture number n starts from the noise of seed n, so that any one of them can be made again by itself.
    """
    began = time.perf_counter()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pairs = evaluation_prompts(knobs)
    read: list[int] = []
    while len(read) < len(pairs):
        part = range(len(read), min(len(read) + knobs.samples_per_batch, len(pairs)))
        pictures = pipeline(
            [pairs[number][0] for number in part],
            num_inference_steps=knobs.sampler_steps,
            guidance_scale=knobs.guidance,
            generator=[torch.Generator().manual_seed(number) for number in part],
            output_type="pt",
        ).images
        read += classifier.predict(features(pictures * 2 - 1)).tolist()
        say(f"evaluation: {len(read)}/{len(pairs)} pictures")
    wrong = [
        {"seed": number, "prompt": prompt, "read": seen}
        for number, ((prompt, digit), seen) in enumerate(zip(pairs, read, strict=True))
        if seen != digit
    ]
    return {
        "samples": len(pairs),
        "right": len(pairs) - len(wrong),
        "steps": knobs.sampler_steps,
        "guidance_scale": knobs.guidance,
        "seconds": round(time.perf_counter() - began, 1),
        "wrong": wrong,
    }


def save(folder: Path, tokenizer: Any, denoiser: Any, vae: Any) -> None:
    """Writes the pipeline's folder, such that transformers 4 reads it as well as transformers 5.

    Transformers 4 wants the tokenizer as vocab.json and merges.txt, and the names of the text encoder's weights as
    every published Stable Diffusion has them, under "text_model.", which transformers 5 leaves out.
    """
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=denoiser.unet, text_encoder=denoiser.text_encoder, tokenizer=tokenizer,
        scheduler=build_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    named = denoiser.text_encoder.state_dict().items()
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in named}
    save_file(weights, folder / "text_encoder" / "model.safetensors", {"format": "pt"})


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of the folder but the record itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "record.json")
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }


def make(knobs: Knobs, folder: Path) -> dict[str, Any]:
    """Trains, saves and evaluates; gives the record."""
    began = time.perf_counter()
    torch.manual_seed(knobs.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(knobs.threads)
    dice = torch.Generator().manual_seed(knobs.seed)
    images, labels = load_images(knobs.image_size)
    train, test = train_test_split(np.arange(len(labels)), test_size=knobs.held_out, stratify=labels, random_state=0)
    classifier = SVC(kernel="rbf", C=10).fit(features(images[train]), labels[train])
    tokenizer = build_tokenizer(knobs)
    vae, vae_lines = train_vae(knobs, images[train], dice)
    vae_lines["held_out_rms_error"] = reconstruction_error(vae, images[test])
    latents = encode(vae, images[train], dice)
    denoiser, unet_lines = train_denoiser(knobs, tokenizer, latents, labels[train].tolist(), dice)
    save(folder, tokenizer, denoiser, vae)
    files = digests(folder)
    return {
        "script": "tools/train_demo.py",
        "data": "scikit-learn load_digits, 8x8 upsampled (bicubic)",
        "knobs": asdict(knobs),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "transformers", "scikit-learn", "numpy")},
        "classifier": {
            "kind": "SVC, rbf kernel, C=10, on 8x8 averages",
            "trained_on": len(train),
            "held_out": len(test),
            "held_out_accuracy": round(float(classifier.score(features(images[test]), labels[test])), 5),
        },
        "training": {"vae": vae_lines, "text_encoder_and_unet": unet_lines},
        "evaluation": evaluate(knobs, folder, classifier),
        "seconds": round(time.perf_counter() - began, 1),
        "files": files,
        "total_bytes": sum(entry["bytes"] for entry in files.values()),
    }


def main(argv: list[str] | None = None) -> int:
    """Gives 0 if the model passed, 1 if too few samples were read right or the folder grew too large."""
    parser = argparse.ArgumentParser(description="Train the demonstration pipeline on scikit-learn's digits.")
    parser.add_argument("--out", type=Path, default=Path("src/optimize/demo"), help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; never ship what it writes")
    args = parser.parse_args(argv)
    knobs = Knobs(seed=args.seed)
    if args.quick:
        knobs = replace(knobs, vae_steps=20, unet_steps=20, sampler_steps=4, samples_per_digit=2, required=0.0)
    record = make(knobs, args.out)
    (args.out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    result = record["evaluation"]
    share = result["right"] / result["samples"]
    print(f"{args.out}: {result['right']}/{result['samples']} samples read right, {record['total_bytes']} bytes")
    if share < knobs.required:
        say(f"failed: {share:.1%} of the samples were read right, {knobs.required:.0%} are required")
    if record["total_bytes"] > knobs.most_bytes:
        say(f"failed: {record['total_bytes']} bytes, {knobs.most_bytes} are allowed")
    return int(share < knobs.required or record["total_bytes"] > knobs.most_bytes)


if __name__ == "__main__":
    sys.exit(main())
