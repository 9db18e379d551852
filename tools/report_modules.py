"""Where a network's time lies, as a treemap: modules in modules, the area is time, the colour the kind of work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import Any

from optimize.profiles.schema import Breakdown

from .report_charts import Figure, figure
from .report_words import milliseconds, operator_colours, percent

NOWHERE = "(no module)"
LEAST_SHARE = 0.004
MIXED = "mixed"
"""The page puts the colour of its tracks here: plotly chooses a text's colour by that of its box."""


@dataclass
class Box:
    """A module, or a kind of work in it. `us` are whole microseconds: plotly draws nothing where boxes are larger than
    what holds them, be it by rounding."""

    name: str
    us: int = 0
    kind: str = ""
    inside: dict[str, Box] = field(default_factory=dict)

    def add(self, path: list[str], kind: str, us: int) -> None:
        self.us += us
        if not path:
            self.kind = kind
            return
        self.inside.setdefault(path[0], Box(path[0])).add(path[1:], kind, us)

    def folded(self) -> Box:
        """A box with a single one in it is one box: `attn1` with only `to_q` in it is `attn1.to_q`."""
        inside = [b.folded() for b in self.inside.values()]
        if len(inside) == 1:
            (only,) = inside
            name = self.name if only.name == only.kind else f"{self.name}.{only.name}"
            return Box(name, self.us, only.kind, only.inside)
        return Box(self.name, self.us, self.kind, {b.name: b for b in inside})

    def walk(self, least: float, parent: str = "", id_: str = "0") -> Iterator[tuple[str, str, Box]]:
        """(id, parent's id, box), those below `least` microseconds left out."""
        yield id_, parent, self
        for i, box in enumerate(self.inside.values()):
            if box.us >= least:
                yield from box.walk(least, id_, f"{id_}.{i}")


def treemap(breakdown: Breakdown) -> Figure:
    top = Box("")
    for row in breakdown.operators:
        top.add([*steps(row.module), row.operator], row.operator, round(row.ms * 1e3))
    top = Box(f"{breakdown.component} · {breakdown.backend} {breakdown.precision}", top.us, "", top.inside)
    root = Box(top.name, top.us, "", {b.name: b for b in (inner.folded() for inner in top.inside.values())})
    boxes = list(root.walk(LEAST_SHARE * root.us))
    colours = operator_colours(o.operator for o in breakdown.operators) | {"": MIXED}
    trace: dict[str, Any] = {
        "type": "treemap",
        "branchvalues": "total",
        "ids": [i for i, _, _ in boxes],
        "parents": [p for _, p, _ in boxes],
        "labels": [escape(b.name) for _, _, b in boxes],
        "values": [b.us for _, _, b in boxes],
        "text": [told(b, breakdown.run_ms) for _, _, b in boxes],
        "textinfo": "label",
        "textfont": {"size": 11},
        "hovertemplate": "<b>%{label}</b><br>%{text}<extra></extra>",
        "marker": {"colors": [colours[b.kind] for _, _, b in boxes], "cornerradius": 3,
                   "line": {"width": 1, "color": "rgba(128,128,128,.35)"}, "pad": {"t": 18, "l": 2, "r": 2, "b": 2}},
        "pathbar": {"visible": True, "thickness": 20},
        "tiling": {"pad": 1},
    }  # fmt: skip
    return figure([trace], height=440, margin={"l": 0, "r": 0, "t": 24, "b": 0})


def told(box: Box, run_ms: float) -> str:
    words = f"{milliseconds(box.us / 1e3)}, {percent(box.us / 1e3 / run_ms)} of the run"
    return f"{escape(box.kind)}: {words}" if box.kind else words


def steps(module: str) -> list[str]:
    """`down_blocks.0.resnets.1.conv1` is three steps down: a number belongs to what it counts."""
    found: list[str] = []
    for part in module.split(".") if module else [NOWHERE]:
        if part.isdigit() and found:
            found[-1] += f".{part}"
        else:
            found.append(part)
    return found
