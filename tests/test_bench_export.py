"""The real benchmark on a U-Net of a few thousand weights: two exporters, one round, and a graph that is broken."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optimize.errors import InputError
from optimize.tools import bench_export, bench_record
from optimize.tools.bench_cases import Case, pixels
from optimize.tools.bench_record import GOALS, Ratio, ratio_row, side_from_rounds

SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module", autouse=True)
def small() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        case = Case("a very small U-Net", SMALL, latency=pixels(64, 8), runs=2)
        patch.setattr(bench_export, "CASES", {**bench_export.CASES, "small": case})
        yield


def run(work: Path, name: str, sides: list[str], optimum: Path | None = None) -> dict[str, Any]:
    records = work / name
    path = bench_export.run_case("small", rounds=1, seed=0, work=work, records=records, optimum=optimum, sides=sides)
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.fixture(scope="module")
def record(work: Path) -> dict[str, Any]:
    """Ours, dynamo, and optimum-onnx in an environment that does not have it."""
    return run(work, "whole", ["ours", "dynamo", "optimum"], Path(sys.executable))


def rows(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["ratio"]: row for row in record["ratios"]}


def test_the_record_names_what_allowed_its_figures(record: dict[str, Any]) -> None:
    assert record["case"] == "small" and record["rounds"] == 1 and record["seed"] == 0
    assert record["device"]["cpu"] and record["device"]["cores"] >= 1 and record["device"]["memory_gib"] > 0
    assert set(record["load"]) == {"average_before", "average_after", "seconds", "others", "busy"}
    assert record["load"]["busy"] == (record["load"]["others"] > 0.05)
    assert record["versions"]["ours"]["torch"] and record["commit"]["revision"]
    assert record["model"]["weights_bytes"] >= 4 * record["model"]["parameters"] > 0
    assert sorted(record["order"][0]) == ["dynamo", "optimum", "ours"]
    assert str(Path(sys.prefix)) not in json.dumps(record)
    for side in ("ours", "dynamo"):
        parity = record["sides"][side]["parity"]
        assert parity["passed"] and 0 < parity["relative"] < 1e-4
        assert parity["sizes"] != record["model"]["sizes"]["traced"]


def test_figures_are_those_of_the_exports(record: dict[str, Any]) -> None:
    ours, dynamo = record["sides"]["ours"], record["sides"]["dynamo"]
    assert ours["opset"] == 23 and dynamo["opset"] == 20
    assert 0 < ours["nodes"] < dynamo["nodes"]
    for side in (ours, dynamo):
        assert side["file_bytes"] >= 4 * record["model"]["parameters"]
        assert set(side["latency_ms"]) == {"1", "2"} and min(f["median"] for f in side["latency_ms"].values()) > 0
        memory = {name: f["median"] for name, f in side["memory"].items()}
        assert memory["peak_rss"] > memory["peak_over_imports"] >= memory["peak_over_loaded"] > 0
        assert memory["peak_rss"] > memory["peak_anon_sampled"] > 0
        assert side["process_s"]["median"] > side["export_s"]["median"]
    assert sum(f["median"] for f in ours["steps_s"].values()) <= ours["export_s"]["median"]


def test_ratios_are_those_of_the_medians(record: dict[str, Any]) -> None:
    ours, dynamo, found = record["sides"]["ours"], record["sides"]["dynamo"], rows(record)
    wall = found["export wall: ours / dynamo"]
    assert wall["value"] == pytest.approx(ours["export_s"]["median"] / dynamo["export_s"]["median"])
    assert wall["id"] == "C5" and wall["mark"] == GOALS["C5"].mark(wall["value"])
    assert found["nodes: ours / dynamo"]["value"] == pytest.approx(ours["nodes"] / dynamo["nodes"])
    error = found["relative error to eager fp32, at sizes not traced: ours"]
    assert error["value"] == ours["parity"]["relative"] and "theirs" not in error


def test_a_worker_that_fails_is_said_and_gives_no_ratio(record: dict[str, Any]) -> None:
    optimum = record["sides"]["optimum"]
    assert optimum["state"] == "failed" and "No module named 'optimum.exporters.onnx'" in optimum["why"]
    row = rows(record)["export wall: ours / optimum-onnx"]
    assert row["value"] is None and "No module named" in row["why"]


def test_the_table_shows_every_ratio(record: dict[str, Any], work: Path) -> None:
    text = bench_record.table(work / "whole")
    assert len(text.splitlines()) == 4 + len(record["ratios"])
    wall = rows(record)["export wall: ours / dynamo"]
    assert f"| C5 | export wall: ours / dynamo | {wall['value']:.3g} |" in text
    with pytest.raises(InputError, match="no records in"):
        bench_record.table(work / "nowhere")


def test_a_wrong_graph_has_no_figure(record: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights' file is spoilt between export and judgement."""
    whole = bench_export.exported

    def spoilt(bench: Any, side: str, folder: Path, known: Any) -> dict[str, Any]:
        result = whole(bench, side, folder, known)
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-4096, 2)
            file.write(b"\x00\x00\x80\x3f" * 1024)  # 1.0 in a thousand places
        return result

    monkeypatch.setattr(bench_export, "exported", spoilt)
    broken = run(work, "broken", ["ours", "optimum"])
    ours = broken["sides"]["ours"]
    assert ours["state"] == "failed" and ours["why"].startswith("parity failed: relative error")
    assert not ours["parity"]["passed"] and ours["parity"]["relative"] > 1e-4
    assert not {"export_s", "memory", "latency_ms", "nodes"} & set(ours)
    assert all(row["value"] is None for row in broken["ratios"])
    assert "parity failed" in rows(broken)["export wall: ours / dynamo"]["why"]
    optimum = broken["sides"]["optimum"]
    assert optimum["state"] == "skipped" and "needs --optimum-python" in optimum["why"]


def results(seconds: float, relative: float = 1e-6) -> dict[str, Any]:
    marks = "imports_rss", "loaded_rss", "peak_rss", "imports_anon", "loaded_anon", "peak_anon_sampled"
    memory = dict.fromkeys(marks, 1)
    graph = {"nodes": 10, "constant_nodes": 0, "opset": 23, "files": 2, "file_bytes": 9}
    parity = {"passed": relative <= 1e-4, "relative": relative, "rule": "relative error <= 0.0001"}
    return {"seconds": seconds, "memory_bytes": memory, "parity": parity, **graph}


def test_medians_spread_and_the_range_of_each_round() -> None:
    sides = {
        "ours": side_from_rounds([results(s) for s in (2.0, 1.0, 4.0)]),
        "dynamo": side_from_rounds([results(s) for s in (4.0, 5.0, 5.0)]),
    }
    assert sides["ours"]["export_s"] == {"median": 2.0, "spread": 1.5, "rounds": [2.0, 1.0, 4.0]}
    row = ratio_row({"sides": sides}, Ratio("wall", "ours.export_s", "dynamo.export_s", "C5"))
    assert (row["value"], row["low"], row["high"], row["mark"]) == (0.4, 0.2, 0.8, "goal")


def test_one_bad_round_takes_all_figures_away() -> None:
    side = side_from_rounds([results(1.0), results(1.0, relative=0.5), results(1.0)])
    assert side["state"] == "failed" and side["parity"]["relative"] == 0.5
    row = ratio_row({"sides": {"ours": side}}, Ratio("wall", "ours.export_s", "dynamo.export_s", "C5"))
    assert row["value"] is None and "0.5" in row["why"]


@pytest.mark.parametrize(("value", "mark"), [(0.25, "moon"), (0.26, "goal"), (0.8, "floor"), (0.81, "missed")])
def test_marks(value: float, mark: str) -> None:
    assert GOALS["C5"].mark(value) == mark


def test_the_worker_needs_no_package_and_the_command_answers() -> None:
    worker = f"import runpy; runpy.run_path({str(bench_export.WORKER)!r}, run_name='worker')"
    subprocess.run([sys.executable, "-S", "-P", "-c", worker], check=True)
    command = [sys.executable, str(bench_export.WORKER.with_name("bench_export.py"))]
    answer = subprocess.run([*command, "--help"], check=True, capture_output=True, text=True)
    assert "--make-optimum-env" in answer.stdout
    wrong = subprocess.run([*command, "--table", "--records", "nowhere"], check=False, capture_output=True, text=True)
    assert wrong.returncode == 2 and "no records in nowhere" in wrong.stderr and "Traceback" not in wrong.stderr
