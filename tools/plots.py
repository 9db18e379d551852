"""Results as pictures, where matplotlib is installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimize.compile.records import Receipt

MOST = 40
FEW, HIGH = "#3b78c2", "#d9822b"


def sensitivity_plot(id_: str, receipt: Receipt, path: Path) -> Path | None:
    """Bars of what each layer's quantization alone does to the output, the worst `MOST`; orange ones were left high.

    Gives the picture's path; None without matplotlib, or where no layer was measured. The file comes whole."""
    layers = sorted((x for x in receipt.layers if x.error is not None), key=lambda x: x.error or 0.0)[-MOST:]
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        return None
    if not layers:
        return None
    figure = Figure(figsize=(10, 1.6 + 0.24 * len(layers)), layout="constrained")
    axes = figure.subplots()
    few = [x.precision == receipt.scheme for x in layers]
    axes.barh([x.module for x in layers], [x.error or 0.0 for x in layers], color=[FEW if f else HIGH for f in few])
    axes.set_xlabel("relative error of the component's output when this layer alone is quantized")
    axes.set_title(f"{id_}: {receipt.chosen} of {receipt.found} layers quantized ({receipt.budget})", fontsize=11)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(y=0.01)
    words = ((FEW, receipt.scheme), (HIGH, f"left in {receipt.base.split('/')[1]}"))
    axes.legend(handles=[Patch(color=colour, label=word) for colour, word in words], loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.svg")
    figure.savefig(partial)
    partial.replace(path)
    return path
