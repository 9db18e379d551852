"""`optimize.record`: the feeds of a pipeline's networks as they pass by, kept as calibration sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import InputError
from optimize.progress import Progress

if TYPE_CHECKING:
    from optimize.quantize.recording import Recording
    from optimize.quantize.sets import CalibrationSet


def record(pipe: Any, folder: Path | str, *, components: Sequence[str] = (), every: int = 1) -> Recording:
    """Records what flows into the networks of a diffusers pipeline, whatever it is used for.

    `with optimize.record(pipe, "feeds") as recording: pipe("a prompt")` writes a calibration set per component,
    `feeds/unet` and so on, of every `every`-th call; `optimize quantize --calibration feeds` takes it. The pipeline's
    results are untouched, its modules have no hooks afterwards, and after an error in the block there is no set.
    Raises InputError for no pipeline, an unknown component, a folder that has such a set, and a component asked for by
    name of which nothing could be recorded.
    """
    from optimize.quantize.recording import Recording

    return Recording(pipe, Path(folder), components, every)


def record_source(
    source: str,
    out: Path | str,
    *,
    prompts: Sequence[str] = (),
    samples: int = 32,
    seed: int = 0,
    components: Sequence[str] = (),
    axes: Sequence[str] = (),
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, CalibrationSet], dict[str, str]]:
    """Runs the pipeline of a source over prompts and records it: at most `samples` of each component.

    Gives the sets by component, and for those without one why. The same again finds what is there and goes on.
    Raises InputError for a source without a pipeline, and for a component asked for of which nothing was recorded.
    """
    from optimize.compile.sources import Trust, source_from_text
    from optimize.exporting import components_for, request_from_words
    from optimize.quantize import data
    from optimize.quantize.texts import check_seed

    check_seed(seed)
    progress = progress or Progress()
    if samples < 1:
        raise InputError("no samples were asked for", got=samples, expected="1 or more", mend="--samples 32")
    request = request_from_words(source, out, components=components, axes=axes, allow_pickle=allow_pickle)
    found = source_from_text(request.source, Trust(allow_pickle), components)
    chosen = components_for(request)
    with progress.step("record"):
        made, never = data.record_source(
            chosen, found, request.out, prompts=prompts, samples=samples, seed=seed, say=progress.say
        )
    if lost := [name for name in components if name in never]:
        raise InputError(
            f"nothing was recorded of {lost[0]}",
            got=never[lost[0]],
            expected="calls within the component's axes",
            mend="leave it out, or give --axis sizes that the pipeline uses",
        )
    return made, never


def prompts_from_file(path: Path) -> list[str]:
    """One prompt a line; empty lines are none. Raises InputError for a file that cannot be read or has none."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read", got=str(e), expected="a text file, one prompt a line") from e
    if not any(lines):
        raise InputError(
            f"{path} has no prompts", got="nothing", expected="one prompt a line", mend="write some into it"
        )
    return [line for line in lines if line]
