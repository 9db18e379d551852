"""The demo: export, prove, build engines, and draw digits through the exported ONNX components alone.

`make demo` runs this. torch is used for random numbers and by the scheduler; every network runs in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TARGETS = ("rtx-4090", "rtx-5090")
STEPS, GUIDANCE, EACH, SIZE = 25, 3.0, 4, 32


class OnnxPipeline:
    """Text to image through a bundle's ONNX artifacts: `text_encoder`, `unet`, `vae_decoder` in ONNX Runtime."""

    def __init__(self, bundle: Path, pipeline: Path, precision: str = "fp32") -> None:
        from diffusers import DDIMScheduler
        from transformers import CLIPTokenizer

        import optimize

        self.loaded = optimize.load(bundle)
        self.precision = precision
        self.tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
        self.scheduler = DDIMScheduler.from_pretrained(pipeline / "scheduler")
        self.scaling = float(_config(pipeline / "vae" / "config.json")["scaling_factor"])
        self.stack = ExitStack()

    def __enter__(self) -> OnnxPipeline:
        self.runners = {
            name: self.stack.enter_context(self.loaded[name].runner("onnxruntime", self.precision))
            for name in ("text_encoder", "unet", "vae_decoder")
        }
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def embed(self, prompts: list[str]) -> Any:
        """`[prompts, tokens, hidden]` from the text encoder."""
        import torch

        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.runners["text_encoder"].infer({"input_ids": ids.to(torch.int64)})["last_hidden_state"]

    def images(self, prompts: list[str], seeds: list[int]) -> Any:
        """`[prompts, 1, 32, 32]` in -1..1: classifier-free guidance (Ho and Salimans 2021) over DDIM steps."""
        import torch

        text = torch.cat([self.embed([""] * len(prompts)), self.embed(prompts)])
        record = self.loaded["unet"].record
        side = SIZE // 4
        latent = torch.cat(
            [
                torch.randn(1, int(record.inputs[0].shape[1]), side, side, generator=torch.Generator().manual_seed(s))
                for s in seeds
            ]
        )
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            feeds = {
                "sample": torch.cat([latent, latent]),
                "encoder_hidden_states": text,
                "timestep": torch.full((2 * len(prompts),), float(t)),
            }
            kinds = {"fp16": torch.float16}.get(self.precision, torch.float32)
            feeds = {k: v if k == "timestep" else v.to(kinds) for k, v in feeds.items()}
            plain, prompted = self.runners["unet"].infer(feeds)["out_sample"].float().chunk(2)
            latent = self.scheduler.step(plain + GUIDANCE * (prompted - plain), t, latent).prev_sample
        decoded = self.runners["vae_decoder"].infer({"latent": (latent / self.scaling).to(text.dtype)})["sample"]
        return decoded.float().clamp(-1, 1)


def _config(path: Path) -> dict[str, Any]:
    import json

    content: dict[str, Any] = json.loads(path.read_text())
    return content


def draw_digits(bundle: Path, picture: Path, precision: str = "fp32") -> tuple[int, int]:
    """Samples every digit `EACH` times, writes a labelled grid, and lets a classifier of real digits read them.

    Returns (read as prompted, sampled).
    """
    import torch

    from optimize.compile.sources import demo_folder

    prompts = [f"a handwritten {w}" for w in WORDS for _ in range(EACH)]
    with OnnxPipeline(bundle, demo_folder(), precision) as pipeline:
        rows = [
            pipeline.images(prompts[i : i + 4], list(range(1000 + i, 1000 + i + 4))) for i in range(0, len(prompts), 4)
        ]
    images = torch.cat(rows)
    write_grid(images, picture)
    read = read_digits(images)
    return sum(int(r) == i // EACH for i, r in enumerate(read)), len(prompts)


def write_grid(images: Any, picture: Path) -> None:
    """Columns are digits, rows are seeds, under the word that was asked for."""
    from PIL import Image, ImageDraw

    scale, head = 3, 18
    cell = SIZE * scale
    grid = Image.new("L", (cell * len(WORDS), head + cell * EACH), 255)
    pen = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        column, row = divmod(i, EACH)
        array = ((image[0] + 1) * 127.5).byte().numpy()
        tile = Image.fromarray(array).resize((cell, cell), Image.Resampling.LANCZOS)
        grid.paste(tile, (column * cell, head + row * cell))
    for column, word in enumerate(WORDS):
        pen.text((column * cell + cell // 2, head // 2), word, fill=0, anchor="mm")
    picture.parent.mkdir(parents=True, exist_ok=True)
    grid.save(picture)


def read_digits(images: Any) -> Any:
    """What a support vector machine trained on scikit-learn's real digits reads in `[n, 1, 32, 32]` images."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC
    from torch.nn.functional import avg_pool2d

    digits = load_digits()
    small = avg_pool2d((images + 1) * 8, 4).reshape(len(images), 64).numpy()
    return SVC(gamma=0.001, C=10).fit(digits.data, digits.target).predict(small)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the whole demo; gives an exit code like the command's."""
    from optimize.tools.cli import main as optimize_command

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    args = parser.parse_args(words)
    target_words = [w for t in TARGETS for w in ("--target", t)]
    print(f"$ optimize export demo --out {args.out} --precision fp32 --precision fp16 {' '.join(target_words)}")
    code = optimize_command(
        ["export", "demo", "--out", str(args.out), "--precision", "fp32", "--precision", "fp16", *target_words]
    )
    if code:
        return code
    print(f"\n$ optimize verify {args.out}")
    code = optimize_command(["verify", str(args.out)])
    if code:
        return code
    picture = args.out / "digits.png"
    right, total = draw_digits(args.out, picture)
    print(
        f"\n{picture}: {total} digits drawn through the ONNX components; "
        f"a classifier of real digits reads {right} as prompted"
    )
    return 0 if right >= 0.9 * total else 1


if __name__ == "__main__":
    sys.exit(main())
