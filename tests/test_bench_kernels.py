"""The kernels' benchmark: it runs here on small shapes, and a side that is wrong or absent gets no figure."""

import json
from pathlib import Path

import pytest
import torch

from optimize.tools import bench_kernels, kernel_cases
from optimize.tools.kernel_cases import GOALS, Case, Sides

CPU = torch.device("cpu")
LIMITS = {"copy_gbps": 10.0, "product_tflops": 1.0}


def test_a_record_of_the_small_family(tmp_path: Path) -> None:
    words = ["--family", "tiny", "--device", "cpu", "--rounds", "2", "--records", str(tmp_path)]
    assert bench_kernels.main(words) == 0
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert [c["case"] for c in record["cases"]] == [c.name for c in kernel_cases.TINY]
    for case in record["cases"]:
        ours = case["sides"]["ours"]
        assert ours["state"] == "measured"
        assert 0 < ours["error"] < 0.01
        assert ours["p10_ms"] <= ours["median_ms"] <= ours["p90_ms"]
        assert case["value"] > 0


def measured(sides: Sides, against: str = "best", goal: str = "") -> dict:
    case = Case("made up", goal, against, lambda device: sides, flops=1e6, least_bytes=1000)
    return bench_kernels.measured_case(case, bench_kernels.CpuTimer(), CPU, 2, LIMITS)


def refuse() -> torch.Tensor:
    raise RuntimeError("No available kernel. Aborting execution.")


def test_a_wrong_side_has_no_figure_and_an_absent_one_says_why() -> None:
    exact = torch.ones(8, dtype=torch.float64)
    near, far = exact + 1e-3, exact + 1e-2
    sides = Sides(
        {"ours": lambda: far, "default": lambda: near, "cudnn": refuse}, lambda out: kernel_cases.relative(out, exact)
    )
    row = measured(sides)
    assert row["value"] is None
    assert row["sides"]["ours"]["state"] == "wrong"
    assert "median_ms" not in row["sides"]["ours"]
    assert row["sides"]["cudnn"] == {"state": "declined", "why": "No available kernel. Aborting execution."}
    assert row["sides"]["default"]["state"] == "measured"


def test_nan_is_wrong() -> None:
    exact = torch.ones(8, dtype=torch.float64)
    sides = Sides(
        {"ours": lambda: exact * torch.nan, "eager": lambda: exact + 1e-3},
        lambda out: kernel_cases.relative(out, exact),
    )
    assert measured(sides, "eager")["sides"]["ours"]["state"] == "wrong"


@pytest.mark.parametrize(("id_", "value", "mark"), [("G1", 0.76, "floor"), ("G1", 0.7, "missed"), ("G8", 0.9, "goal")])
def test_goals_are_marked_in_their_direction(id_: str, value: float, mark: str) -> None:
    assert GOALS[id_].mark(value) == mark


def test_a_goal_is_its_worst_case() -> None:
    rows = bench_kernels.goal_rows([{"goal": "G1", "value": v} for v in (0.9, 0.8, None)])
    assert [(r["id"], r["worst"], r["best"], r["not_measured"]) for r in rows] == [("G1", 0.8, 0.9, 1)]


def test_every_goal_of_the_kernels_has_cases() -> None:
    found = {case.goal for cases in kernel_cases.FAMILIES.values() for case in cases} - {""}
    assert found == set(GOALS)


@pytest.mark.parametrize("shape", [(2, 4, 2, 63, 77, 40), (1, 6, 1, 7, 199, 72)])
def test_exact_attention_is_torchs_in_float64(shape: tuple[int, ...]) -> None:
    """The benchmark's own reference, against another way to compute the same."""
    h = kernel_cases.Heads(*shape)
    q, k, v = (torch.randn(h.batch, n, t, h.head_dim).double() for n, t in
               ((h.heads, h.queries), (h.kv_heads, h.keys), (h.kv_heads, h.keys)))  # fmt: skip
    rows = torch.arange(h.queries)
    mask = torch.ones(h.queries, h.keys, dtype=torch.bool).tril(h.keys - h.queries)
    for causal in (False, True):
        torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask if causal else None, enable_gqa=True)
        assert kernel_cases.relative(kernel_cases.exact_attention(q, k, v, causal, rows), torchs) < 1e-12


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        ([(10, 64, True), (5, 64, False)], {"min_work": 10, "max_width": 64}),
        ([(10, 64, True), (20, 512, False), (30, 64, True)], {"min_work": 10, "max_width": 64}),
        ([(10, 64, False), (20, 64, False)], None),
        ([(10, 64, True), (20, 64, False), (30, 64, True)], {"min_work": 30, "max_width": 64}),
    ],
)
def test_a_threshold_takes_in_no_case_that_lost(rows: list[tuple[int, int, bool]], rule: dict[str, int] | None) -> None:
    assert bench_kernels.threshold_of(rows) == rule


def test_thresholds_come_from_right_results_alone() -> None:
    """A kernel that was wrong has not won, whatever time it took."""

    def case(state: str, ours: float, work: int) -> dict:
        sides = {"ours": {"state": state, "median_ms": ours}, "eager": {"state": "measured", "median_ms": 2.0}}
        return {"operation": "layer_norm", "size": [work, 64], "sides": sides}

    assert bench_kernels.thresholds_from([case("measured", 1.0, 7), case("wrong", 1.0, 9)]) == {}
    assert bench_kernels.thresholds_from([case("measured", 1.0, 7), case("measured", 3.0, 5)]) == {
        "layer_norm": {"min_work": 7, "max_width": 64}
    }
