"""The benchmark of the native library: what it refuses to time, and what it writes."""

import json
from pathlib import Path

import pytest
import torch

from optimize.errors import GateError
from optimize.tools import bench_native


@pytest.mark.parametrize("case", bench_native.CASES, ids=lambda case: case.name)
def test_every_case_has_a_body_and_a_place(case: bench_native.Case) -> None:
    from optimize.kernels import functions

    assert case.ours.domain == functions.DOMAIN and case.where
    assert list(functions.function(case.ours.op).input) and len(case.ours.inputs) == len(
        functions.function(case.ours.op).input
    )


def test_a_side_that_is_wrong_is_not_timed() -> None:
    (case,) = bench_native.chosen("clip-text")
    tensors = case.tensors()
    sides = bench_native.sides_of(case, tensors, 1)
    assert max(bench_native.check(case, sides, tensors).values()) < bench_native.ALLOWED
    sides["fused"].feeds["q_flat"] = torch.zeros(1, 77, 768).numpy()
    with pytest.raises(GateError, match="fused is wrong and is not timed"):
        bench_native.check(case, sides, tensors)


def test_the_record(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    assert bench_native.main(["--only", "clip-text", "--rounds", "2", "--threads", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    (row,) = record["rows"]
    assert row["case"] == "clip-text" and row["threads"] == 1 and set(row["sides"]) == {"ours", "body", "fused"}
    assert all(0 < side["p10_ms"] <= side["p90_ms"] for side in row["sides"].values())
    assert record["device"]["cores"] >= 1 and set(row["ratios"]) == {"body/ours", "fused/ours"}


def test_an_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_native.main(["--only", "sd99"]) == 2
    assert "no such case" in capsys.readouterr().err
