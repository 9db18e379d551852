"""Feeds where there are no real ones: trajectories that a network walks by itself, smooth images.

What is drawn at random says so in the set's `how`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from optimize.compile.feeds import feeds_for
from optimize.compile.runners import EagerRunner
from optimize.compile.spec import Axis, Component

from .sets import SetWriter

STEPS = 8
"""Samples of one trajectory."""
GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, without their whole part, are spread over 0 to 1 however many there are."""
SMALL = 50_000_000  # parameters: larger networks are given smaller images
SIZES: Mapping[str, int] = {"batch": 1, "height": 256, "width": 256, "image_tokens": 256, "tokens": 128, "past": 64}
"""Axis -> the most that a network is given where its range allows it; a small one is given images of its own size."""
FLOWS = ("SD3Transformer2DModel", "FluxTransformer2DModel")
"""Networks that predict a velocity between noise and image (flow matching); the others predict the noise."""
TIMES = ("timestep", "unit")


@contextmanager
def eager(component: Component) -> Iterator[EagerRunner]:
    """The reference itself; streamed where twice its weights do not fit into half of the free memory."""
    import psutil

    weights = 4 * parameters(component)
    with EagerRunner(component, streamed=2 * weights > psutil.virtual_memory().available / 2) as runner:
        yield runner


def parameters(component: Component) -> int:
    return sum(p.numel() for p in component.build().parameters())


def usual_sizes(component: Component) -> dict[str, int]:
    """A size for each axis, within its range: one row, and for big networks small images."""
    big = parameters(component) > SMALL
    return {name: within(axis, usual(axis, big)) for name, axis in component.axes.items()}


def usual(axis: Axis, big: bool) -> int:
    free = not big and axis.name in ("height", "width")
    return axis.opt if free else min(axis.opt, SIZES.get(axis.name, axis.opt))


def within(axis: Axis, size: int) -> int:
    """The nearest size below that the axis has, else its smallest."""
    return max(axis.min, min(axis.max, size // axis.step * axis.step))


# --- denoisers --------------------------------------------------------------------------------------------------------


def is_denoiser(component: Component) -> bool:
    """Something noisy and a time come in."""
    fills = [t.fill for t in component.inputs]
    return fills[:1] == ["normal"] and len(component.inputs[0].shape) > 2 and any(f in TIMES for f in fills)


def trajectories(writer: SetWriter, component: Component, seed: int, say: Callable[[str], None]) -> None:
    """From noise along a schedule, each step by the network's own output; where that is no image, the noise of each
    level is laid over a smooth one."""
    sizes, total = usual_sizes(component), writer.total or 0
    runs = math.ceil(total / STEPS)
    each = math.ceil(total / runs)
    with eager(component) as runner:
        for run in range(len(writer.notes) // each, runs):
            say(f"walking: trajectory {run + 1} of {runs}")
            kept = spread(each, STEPS, run)
            for i, (feeds, timestep) in enumerate(steps_of(runner, component, sizes, seed * 1_000_003 + run)):
                if i in kept:  # the writer leaves out what it has already
                    writer.add(feeds, {"run": run, "call": i, "timestep": timestep})
                if writer.full:
                    return


def spread(count: int, of: int, turn: int = 0) -> set[int]:
    """`count` of the indices 0 to `of` - 1, evenly apart, and at other places each turn."""
    begin = turn * GOLDEN % 1
    return {int(of * (i + begin) / count) for i in range(count)} if count < of else set(range(of))


def steps_of(
    runner: EagerRunner, component: Component, sizes: Mapping[str, int], seed: int
) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """(feeds, timestep) at each of `STEPS` steps of one trajectory."""
    first = component.inputs[0]
    time = next(t for t in component.inputs if t.fill in TIMES)
    conditions = feeds_for(component.inputs, sizes, "fp32", seed)
    scheduler = schedule_of(component)
    rng = torch.Generator().manual_seed(seed)
    noise = conditions[first.name]
    image = smooth(first.sizes(sizes), rng)
    x, walks = noise, True
    for t in scheduler.timesteps:
        level = float(t) / 1000 if time.fill == "unit" else float(t)
        x = x if walks else noisy(scheduler, image, noise, t)
        feeds = {**conditions, first.name: x, time.name: torch.full_like(conditions[time.name], level)}
        yield feeds, level
        output = prediction(runner.infer(feeds)[component.outputs[0]], x) if walks else None
        walks = output is not None
        if output is not None:
            x = scheduler.step(output, t, x).prev_sample


def schedule_of(component: Component) -> Any:
    """Flow matching (Lipman et al. 2023) by Euler steps, or DDIM (Song et al. 2021) with Stable Diffusion's noise. An
    untrained network can say anything of the noise: the image that follows from it is kept within what latents are."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    flow = component.class_name in FLOWS
    scheduler = (
        FlowMatchEulerDiscreteScheduler()
        if flow
        else DDIMScheduler(beta_schedule="scaled_linear", clip_sample=True, clip_sample_range=3.0)
    )
    scheduler.set_timesteps(STEPS)
    return scheduler


def prediction(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """The network's output where it has the sample's shape, without a second half of channels (a learned variance)."""
    if output.dim() == x.dim() and output.shape[1] == 2 * x.shape[1] and x.dim() == 4:
        output = output.chunk(2, dim=1)[0]
    return output if output.shape == x.shape and bool(torch.isfinite(output).all()) else None


def noisy(scheduler: Any, image: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    at = t.reshape(1)
    made: torch.Tensor = (
        scheduler.add_noise(image, noise, at)
        if hasattr(scheduler, "add_noise")
        else scheduler.scale_noise(image, at, noise)
    )
    return made


# --- images -----------------------------------------------------------------------------------------------------------


def smooth(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Random images with the falling spectrum of real ones: noise of every octave, half as strong at twice the
    fineness; of mean 0 and deviation 1. What is no image is plain noise."""
    if len(shape) != 4:
        return torch.randn(shape, generator=rng)
    total, cells, strength = torch.zeros(shape), 2, 1.0
    while cells < 2 * min(shape[2:]):
        grid = torch.randn(*shape[:2], min(cells, shape[2]), min(cells, shape[3]), generator=rng)
        total += strength * torch.nn.functional.interpolate(grid, shape[2:], mode="bicubic", align_corners=False)
        cells, strength = 2 * cells, strength / 2
    return (total - total.mean()) / total.std(correction=0).clamp_min(1e-6)


def images(writer: SetWriter, component: Component, seed: int) -> None:
    """Smooth random images: within -1 to 1 for a VAE's encoder, of deviation 1 for vision; for a VAE's decoder smooth
    latents as its encoder would scale them."""
    (spec,) = component.inputs
    sizes = usual_sizes(component)
    scale = float(component.config.get("scaling_factor") or 1.0)
    shift = float(component.config.get("shift_factor") or 0.0)
    for i in range(len(writer.notes), writer.total or 0):
        image = smooth(spec.sizes(sizes), torch.Generator().manual_seed(seed * 1_000_003 + i))
        if component.role == "vae_decoder":
            image = image / scale + shift
        if component.role == "vae_encoder":
            image = (image / 2).clamp(-1, 1)
        writer.add({spec.name: image}, {"draw": i})


def draws(writer: SetWriter, component: Component, seed: int) -> None:
    """`compile.feeds` with another seed each time."""
    sizes = usual_sizes(component)
    for i in range(len(writer.notes), writer.total or 0):
        writer.add(feeds_for(component.inputs, sizes, "fp32", seed * 1_000_003 + i), {"draw": i})
