"""After a missed gate: the first node whose value departs, and a command that shows the miss again."""

from __future__ import annotations

from pathlib import Path

from optimize.compile.spec import Component


def write_reproduction(path: Path, component: Component, precision: str, sizes: dict[str, int], folder: Path) -> str:
    return ""


def first_departure(path: Path, component: Component, precision: str, sizes: dict[str, int]) -> str:
    return ""
