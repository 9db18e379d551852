"""Calibration: real samples go through the fp32 graph one at a time, and a histogram of each tapped value is kept.

What is kept does not grow with the number of samples. It lies in a file that is written after every few of them, so
that an interrupted calibration goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch

from optimize.compile.runners import Feeds
from optimize.errors import InputError

from .running import GraphSession
from .scales import Array, Histogram
from .sets import write_whole

SAVE_EVERY = 8


class Samples(Protocol):
    """Sets of feeds that can be walked through again and again, one in memory at a time."""

    def __iter__(self) -> Any: ...
    def __len__(self) -> int: ...
    def digest(self) -> str: ...


@dataclass
class Seen:
    """What a value looked like: its numbers, and the largest magnitude per channel of its last axis."""

    histogram: Histogram = field(default_factory=Histogram)
    channels: Array | None = None

    def add(self, x: Any, by_channel: bool) -> None:
        self.histogram.add(x)
        if by_channel and x.dim() and x.numel():
            found = x.float().abs().reshape(-1, x.shape[-1]).amax(0).numpy()
            self.channels = found if self.channels is None else np.maximum(self.channels, found)


@dataclass(frozen=True)
class Calibration:
    """Per value what was seen, over how many samples."""

    seen: Mapping[str, Seen]
    samples: int
    digest: str


def calibrate(
    model: ir.Model,
    folder: Path,
    taps: Sequence[str],
    samples: Samples,
    *,
    by_channel: frozenset[str] = frozenset(),
    divided: Mapping[str, Array] = {},
    graph: str = "",
    cache: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Runs all samples and gives what each tapped value looked like.

    `by_channel` are values whose largest magnitude is kept per channel too. A value in `divided` is divided by that
    vector first, as SmoothQuant does in the layer before; channels divided by infinity do not count. `cache` is a file
    to go on from and to write, where it is of the same samples and of `graph`, which names the model and its weights.

    Raises InputError where there is nothing to calibrate with, and where values are not finite.
    """
    total = len(samples)
    if not total:
        raise InputError(
            "there are no calibration samples", expected="one at least, better 32", mend="--samples N, or --calibration"
        )
    digest = samples.digest()
    divisors = {name: hashlib.sha256(vector.tobytes()).hexdigest()[:16] for name, vector in sorted(divided.items())}
    key = {
        "graph": graph,
        "samples": digest,
        "taps": sorted(taps),
        "by_channel": sorted(by_channel),
        "divided": divisors,
    }
    done, seen = read_cache(cache, key)
    taps = list(dict.fromkeys(taps))
    if done < total:
        session = GraphSession(model, folder, taps)
        for i, feeds in enumerate(samples):
            if i < done:
                continue
            say(f"calibrating: sample {i + 1} of {total}")
            count(session.run(feeds, taps), seen, by_channel, divided)
            if cache is not None and ((i + 1) % SAVE_EVERY == 0 or i + 1 == total):
                write_cache(cache, key, i + 1, seen)
    return Calibration(seen, total, digest)


def count(values: Feeds, seen: dict[str, Seen], by_channel: frozenset[str], divided: Mapping[str, Array]) -> None:
    for name, value in values.items():
        x = value
        if name in divided:
            counted = np.isfinite(divided[name])
            x = (value / value.new_tensor(divided[name]))[..., torch.from_numpy(counted)]
        try:
            seen.setdefault(name, Seen()).add(x, name in by_channel)
        except InputError as e:
            raise InputError(
                f"{name} is not finite in calibration", got=e.got, mend="look at the samples and at the model in fp32"
            ) from e


# --- the cache --------------------------------------------------------------------------------------------------------


def write_cache(path: Path, key: Mapping[str, Any], done: int, seen: Mapping[str, Seen]) -> None:
    """Atomic: the file is whole or the old one."""
    names = sorted(seen)
    arrays: dict[str, Array] = {
        "counts": np.stack([seen[n].histogram.counts for n in names]),
        "figures": np.array([[(h := seen[n].histogram).width, h.low, h.high, h.zeros] for n in names]),
        "about": np.array(json.dumps({"key": key, "done": done, "names": names})),
    }
    arrays |= {f"channels/{n}": c for n in names if (c := seen[n].channels) is not None}
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type] # its `allow_pickle` could be among them

    write_whole(path, write)


def read_cache(path: Path | None, key: Mapping[str, Any]) -> tuple[int, dict[str, Seen]]:
    """(samples done, what was seen); nothing where the file is not there, is broken, or is of other samples."""
    if path is None or not path.is_file():
        return 0, {}
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            if about["key"] != dict(key):
                return 0, {}
            seen = {}
            for i, name in enumerate(about["names"]):
                width, low, high, zeros = (float(v) for v in file["figures"][i])
                channels = file[f"channels/{name}"] if f"channels/{name}" in file.files else None
                seen[name] = Seen(Histogram(file["counts"][i], width, low, high, int(zeros)), channels)
            return int(about["done"]), seen
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return 0, {}  # a cache that cannot be read is no cache
