"""The demo: export, prove, build engines, and draw digits through the exported ONNX components alone.

`make demo` runs this. torch is used for random numbers and by the scheduler; every network runs in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TARGETS = ("rtx-4090", "rtx-5090")
NETWORKS = ("text_encoder", "unet", "vae_decoder")
STEPS, GUIDANCE, EACH, SIZE = 25, 3.0, 4, 32


def draw_digits(bundle: Path, picture: Path, precision: str = "fp32") -> tuple[int, int]:
    """Samples every digit `EACH` times, writes a labelled grid, and lets a classifier of real digits read them.

    Returns (read as prompted, sampled).
    """
    import optimize
    from optimize.evaluating import images_through
    from optimize.profiles.drawing import Drawing
    from optimize.profiles.features import read_as_prompted
    from optimize.progress import Progress
    from optimize.quantize.texts import DIGITS

    prompts = tuple(prompt for prompt in DIGITS for _ in range(EACH))
    seeds = tuple(range(1000, 1000 + len(prompts)))
    loaded = optimize.load(bundle)
    runners = {name: loaded[name].runner("onnxruntime", precision) for name in NETWORKS}
    drawing = Drawing(prompts, seeds, STEPS, GUIDANCE, SIZE, SIZE, batch=4)
    images = images_through(loaded, runners, drawing, Progress(enabled=False))
    write_grid(images, picture)
    return read_as_prompted(images, prompts), len(prompts)


def write_grid(images: Any, picture: Path) -> None:
    """Columns are digits, rows are seeds, under the word that was asked for."""
    from PIL import Image, ImageDraw

    scale, head = 3, 18
    cell = SIZE * scale
    grid = Image.new("L", (cell * len(WORDS), head + cell * EACH), 255)
    pen = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        column, row = divmod(i, EACH)
        array = (image[0] * 255).byte().numpy()
        tile = Image.fromarray(array).resize((cell, cell), Image.Resampling.LANCZOS)
        grid.paste(tile, (column * cell, head + row * cell))
    for column, word in enumerate(WORDS):
        pen.text((column * cell + cell // 2, head // 2), word, fill=0, anchor="mm")
    picture.parent.mkdir(parents=True, exist_ok=True)
    grid.save(picture)


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
