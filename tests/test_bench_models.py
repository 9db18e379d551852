"""`tools/bench_models.py`: the whole tool at tiny sizes, resumed, out of time, broken; the arithmetic of the goals."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from optimize.profiles.schema import Settings
from optimize.profiles.timing import Burst, timing_of
from optimize.tools import bench_models, bench_profiler, model_goals
from optimize.tools.bench_machine import WorkerFailed
from optimize.tools.model_cases import BACKENDS, CASES, GOALS

SETTINGS = Settings(rounds=3, burst_ms=5, warmup_ms=1, attempts=1, drift=0.03, spread=0.1, seed=0)


# --- the whole tool ---------------------------------------------------------------------------------------------------


def words(folder: Path, *more: str) -> list[str]:
    quick = ["--device", "cpu", "--tiny", "--rounds", "3", "--burst", "5", "--again", "0", "--case", "clip-l"]
    return [*quick, "--backend", "eager", "--backend", "fused", "--records", str(folder), *more]


def record_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.iterdir()
    assert path.name == "models-cpu-tiny.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("records")
    assert bench_models.main(words(found)) == 0
    return found


def test_a_case_runs_through_the_profiler_and_is_written(folder: Path) -> None:
    record = record_in(folder)
    entry = record["cases"]["clip-l"]
    rows = {r["backend"]: r for r in entry["profile"]["rows"]}
    assert entry["state"] == "measured"
    assert {n: r["state"] for n, r in rows.items()}.keys() == {"eager", "fused"}
    for row in rows.values():
        assert row["precision"] == "fp16"
        assert row["parity"]["passed"]
        assert row["timing"]["median_ms"] > 0
        assert row["sizes"] == {"batch": 3, "tokens": 7}
    assert record["machine"]["versions"]["torch"]
    assert {v["goal"] for v in record["values"]} == set(GOALS)


def test_what_is_there_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine, in these versions, by these words. What broke is tried anew; what is whole stays."""
    before = record_in(folder)["cases"]["clip-l"]
    asked: list[Sequence[str]] = []

    def refused(given: Sequence[str], seconds: float | None = None) -> dict[str, Any]:
        asked.append(given)
        raise WorkerFailed("exit code -9: it was killed")

    monkeypatch.setattr(bench_models, "run_profile", refused)
    assert bench_models.main(words(folder)) == 0
    assert not asked
    assert record_in(folder)["cases"]["clip-l"] == before
    assert bench_models.main(words(folder, "--case", "t5")) == 0  # one that breaks is an entry, and the rest stay
    cases = record_in(folder)["cases"]
    assert cases["clip-l"] == before
    assert (cases["t5"]["state"], cases["t5"]["why"]) == ("failed", "exit code -9: it was killed")
    assert len(asked) == 1
    assert bench_models.main(words(folder, "--case", "t5")) == 0  # and is tried anew
    assert len(asked) == 2
    assert bench_models.main(words(folder, "--burst", "6")) == 0  # other words: other figures
    assert len(asked) == 3


def test_the_table_says_what_is_not_measured_and_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_models.main(["--table", "--records", str(folder)]) == 0  # on whatever machine
    said = capsys.readouterr().out
    assert (
        "| G10 | SDXL's U-Net: our best backend / torch.compile max-autotune |  |  | 1 | 0.86 | 0.78 | not measured: "
        in said
    )
    assert "sdxl-unet: not run yet" in said


def test_with_too_little_time_left_a_case_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_models, "run_profile", lambda *_: pytest.fail("it was begun"))
    assert bench_models.main(words(tmp_path, "--seconds", "60")) == 0
    entry = record_in(tmp_path)["cases"]["clip-l"]
    assert entry["state"] == "left"
    assert "s were left, and it takes about 90" in entry["why"]


def test_a_profile_that_takes_longer_than_it_may_is_ended_with_all_its_processes() -> None:
    start = time.monotonic()
    with pytest.raises(WorkerFailed, match="it took more than 1 s"):
        bench_profiler.run_profile(["arch:clip-l@tiny", "--device", "cpu"], 1.0)
    assert time.monotonic() - start < 20


def test_a_profile_that_breaks_says_why() -> None:
    with pytest.raises(WorkerFailed, match=r"exit code 2: .*unknown architecture no-such-thing"):
        bench_profiler.run_profile(["arch:no-such-thing"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--bundle", "nothing"], "CASE=DIR"),
        (["--bundle", "nothing=here"], "CASE=DIR"),
        (["--rounds", "2"], "3 or more"),
        (["--backend", "magic"], "unknown backend magic"),
    ],
)
def test_words_that_make_no_sense(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_models.main([*words(tmp_path), *given]) == 2
    assert said in capsys.readouterr().err


def test_somebody_elses_file_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "models-cpu-tiny.json"
    path.write_text("[1, 2")
    assert bench_models.main(words(tmp_path)) == 2
    assert "is no record of this tool" in capsys.readouterr().err
    assert path.read_text() == "[1, 2"


# --- the table of cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [False, True])
def test_every_case_is_a_component_that_takes_its_sizes(tiny: bool) -> None:
    from optimize.candidates import shapes_from_words, subject_from
    from optimize.compile.backends import BACKENDS as KNOWN

    assert set(BACKENDS) <= set(KNOWN)
    for case in CASES.values():
        subject = subject_from(case.source_at(tiny), [case.component], (), ())
        shapes = shapes_from_words([case.shape(tiny)], subject.components)
        assert shapes[case.component]["full"] == dict(case.small if tiny else case.sizes), case.name
    assert {goal for case in CASES.values() for goal in case.goals} | {"G13", "G14"} == set(GOALS)


# --- the goals --------------------------------------------------------------------------------------------------------


def row(backend: str, ms: float, precision: str = "bf16", state: str = "measured", why: str = "") -> dict[str, Any]:
    timing = timing_of([Burst([ms * slow]) for slow in (1.0, 1.1, 1.2)], SETTINGS, "cuda", 1)
    timed = state in ("measured", "inconclusive")
    return {
        "component": "flux_blocks",
        "shape": "full",
        "backend": backend,
        "precision": precision,
        "state": state,
        "why": why,
        "timing": timing.model_dump() if timed else None,
        "ratio": None,
    }


def profiled(rows: Sequence[dict[str, Any]], pick: str = "fused") -> dict[str, Any]:
    picks = [{"component": "flux_blocks", "backend": pick, "precision": "bf16"}]
    return {"rows": list(rows), "choice": {"picks": picks}}


def entry(rows: Sequence[dict[str, Any]], again: Sequence[dict[str, Any]] = (), pick: str = "fused") -> dict[str, Any]:
    case = CASES["flux-blocks"]
    return {
        "case": case.name,
        "what": case.what,
        "precision": "bf16",
        "state": "measured",
        "seconds": 10.0,
        "profile": profiled(rows, pick),
        "again": list(again),
    }


FOUR = [row("eager", 10), row("torch.compile", 8), row("torch.compile-max-autotune", 6), row("fused", 4.5)]


def value(goal: str, found: dict[str, Any]) -> dict[str, Any]:
    return next(v for v in model_goals.values_of({"flux-blocks": found}) if v["goal"] == goal)


def test_our_best_over_the_rival() -> None:
    found = value("G9", entry(FOUR))
    assert found["value"] == pytest.approx(0.75)
    assert (found["ours"], found["theirs"]) == ("fused bf16", "torch.compile-max-autotune bf16")
    (goal,) = (g for g in model_goals.goals_of([found]) if g["id"] == "G9")
    assert goal["mark"] == "moon"
    assert value("G9", entry(FOUR[:3]))["value"] == 1.0  # the rival is one of ours too


def test_what_is_inconclusive_or_absent_has_no_ratio() -> None:
    unsure = [*FOUR[:3], row("fused", 4.5, state="inconclusive", why="the rounds do not agree")]
    assert value("G9", entry(unsure))["ours"] == "torch.compile-max-autotune bf16"
    rival = [*FOUR[:2], row("torch.compile-max-autotune", 6, state="failed", why="out of memory"), FOUR[3]]
    assert value("G9", entry(rival)) == {
        "goal": "G9",
        "case": "flux-blocks",
        "value": None,
        "why": "torch.compile-max-autotune bf16: out of memory",
    }


def test_eight_bits_need_a_backend_that_runs_them() -> None:
    assert "no backend here runs fp8" in value("G12 fp8", entry(FOUR))["why"]
    engine = entry([*FOUR, row("tensorrt", 4.0, "fp8"), row("tensorrt", 5.0, "int8")])
    assert value("G12 fp8", engine)["value"] == pytest.approx(0.5)
    assert value("G12 int8", engine)["value"] == pytest.approx(0.625)


def test_the_pick_is_held_to_the_second_measurement_and_ratios_to_all() -> None:
    second = profiled([row("eager", 10), row("torch.compile-max-autotune", 4.5), row("fused", 4.68)], "fused")
    third = profiled([row("eager", 10), row("torch.compile-max-autotune", 6), row("fused", 4.4)], "fused")
    once = entry(FOUR, [second])
    assert value("G13", once)["value"] == pytest.approx(1.04)
    assert value("G13", once)["theirs"] == "torch.compile-max-autotune bf16"
    assert value("G14", once)["why"] == "measured in 2 processes so far"
    found = value("G14", entry(FOUR, [second, third]))
    assert found["ours"] == "torch.compile-max-autotune bf16"
    assert found["value"] == pytest.approx((0.6 - 0.45) / 0.6)
    assert model_goals.goals_of([found])[0]["mark"] == "missed"


def test_eager_alone_has_no_spread() -> None:
    """Its ratio to itself would be the best spread of all."""
    alone = profiled([row("eager", 10)], "eager")
    assert "nothing beside eager bf16" in value("G14", entry(FOUR, [alone, alone], "eager"))["why"]


def test_the_second_process_is_longer_and_has_the_contenders_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []

    def made_up(given: Sequence[str], seconds: float | None = None) -> dict[str, Any]:
        asked.append(given)
        rest: dict[str, Any] = {"load": {}, "settings": {}, "limits": {}, "notes": []}
        return {**profiled(FOUR), "machine": {"commit": ""}, "made": "", "pipelines": [], **rest}

    monkeypatch.setattr(bench_models, "run_profile", made_up)
    given = ["--device", "cpu", "--tiny", "--records", str(tmp_path), "--case", "flux-blocks"]
    for _ in range(2):  # and when run again there is nothing left to do
        assert bench_models.main(given) == 0
        assert len(asked) == 3
    backends = [[w for i, w in enumerate(words) if words[i - 1] == "--backend"] for words in asked]
    said = [dict(zip(words[1::2], words[2::2], strict=True)) for words in asked]
    assert backends == [list(BACKENDS), *[["eager", "torch.compile-max-autotune", "fused"]] * 2]
    assert [s["--rounds"] for s in said] == ["9", "18", "9"]
    assert [s.get("--seed") for s in said] == [None, "1", "2"]
    assert {v["goal"]: v["value"] for v in record_in(tmp_path)["values"] if v["value"] is not None} == {
        "G9": 0.75,
        "G13": 1.0,
        "G14": 0.0,
    }


def test_contenders_are_those_that_can_be_the_best() -> None:
    assert bench_models.contenders(entry(FOUR)) == ["eager", "torch.compile-max-autotune", "fused"]
    near = [*FOUR, row("torch.compile-fused", 5.6), row("onnxruntime-cuda", 5.7)]
    assert "torch.compile-fused" in bench_models.contenders(entry(near))
    assert "onnxruntime-cuda" in bench_models.contenders(entry(near, pick="onnxruntime-cuda"))
