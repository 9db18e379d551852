"""Pictures: a bar for each measured layer, with its name, and no picture where there is nothing to show."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimize.compile.records import Layer, Receipt
from optimize.tools.plots import MOST, sensitivity_plot

pytest.importorskip("matplotlib")


def receipt(layers: list[Layer]) -> Receipt:
    counts = dict(found=len(layers), chosen=1, calibrated=1, exported=1, kernels=1, samples=1)
    words = dict(scheme="int8", runtime="onnxruntime", base="unet/fp32", method="mse", data="", budget="cosine>=0.999")
    return Receipt.model_validate({**counts, **words, "bytes_base": 2, "bytes_quantized": 1, "layers": layers})


@pytest.mark.parametrize("count", [1, 7, 63])
def test_the_worst_layers_are_shown_by_name(tmp_path: Path, count: int) -> None:
    layers = [
        Layer(name=f"l{i}/Conv", module=f"block.{i}", kind="conv", precision="int8", error=0.001 * (i + 1), gain=1.0)
        for i in range(count)
    ]
    path = sensitivity_plot("unet/int8", receipt(layers), tmp_path / "quality" / "unet.svg")
    assert path is not None and [p.name for p in path.parent.iterdir()] == ["unet.svg"]
    text = path.read_text()
    assert "left in fp32" in text
    shown = [i for i in range(count) if f"<!-- block.{i} -->" in text]
    assert shown == list(range(max(0, count - MOST), count))


def test_nothing_measured_is_no_picture(tmp_path: Path) -> None:
    layer = Layer(name="l/Conv", module="l", kind="conv", precision="int8")
    assert sensitivity_plot("unet/int8", receipt([layer]), tmp_path / "unet.svg") is None
    assert not list(tmp_path.iterdir())
