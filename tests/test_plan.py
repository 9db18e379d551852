"""A plan, deployed: what it chose is what runs, and it is refused where bundle, machine or backend are others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from profile_records import MACHINE, a_profile, a_row

import optimize
from optimize.compile.bundle import MANIFEST
from optimize.errors import GateError, InputError, MissingError
from optimize.profiles.choosing import choose
from optimize.profiles.machine import processor
from optimize.profiles.plan import Part, Plan, plan_from, plan_of, write_plan
from optimize.profiles.reading import write_profile
from optimize.profiles.schema import Profile, Row
from optimize.profiles.wishes import wishes_from_words

COMPONENT = "text_encoder"
HERE = MACHINE.model_copy(update={"key": f"{processor()}, 7 cores, 7 threads"})
FEEDS = {"input_ids": torch.arange(7).reshape(1, 7)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's text encoder in fp32 and in int8. Read it, do not write."""
    folder = tmp_path_factory.mktemp("plan") / "b"
    optimize.export("demo", folder, components=[COMPONENT])
    optimize.quantize(folder, components=[COMPONENT], samples=4)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "b"))


def rows_of(folder: Path, **latencies: float) -> tuple[Row, ...]:
    """Eager, and the artifacts as if they had been measured so."""
    artifacts = optimize.Bundle.read(folder).manifest.artifacts
    found = [a_row(COMPONENT, "eager", "fp32", 77.0)]
    for precision, ms in latencies.items():
        id_ = f"{COMPONENT}/{precision}"
        words = {"artifact": id_, "sha256": artifacts[id_].sha256}
        found.append(a_row(COMPONENT, "onnxruntime", precision, ms, **words))
    return tuple(found)


def profiled(folder: Path, *, slo: tuple[str, ...] = (), **latencies: float) -> Profile:
    record = a_profile(rows=rows_of(folder, **latencies), machine=HERE)
    return record.model_copy(update={"choice": choose(record, wishes_from_words(slo=slo))})


def plan_with(**changes: Any) -> Plan:
    base: dict[str, Any] = {"source": "demo", "made": "now", "device": "cpu", "machine": HERE.key, "met": True}
    return Plan(**{**base, "parts": {COMPONENT: Part(backend="eager", precision="fp32")}, **changes})


def output(runner: Any) -> torch.Tensor:
    with runner:
        found: torch.Tensor = runner.infer(FEEDS)["last_hidden_state"]
        return found.clone()


# --- deployed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latencies", "precision"), [((63.0, 31.0), "int8"), ((31.0, 63.0), "fp32")])
def test_what_the_plan_chose_is_what_runs(
    made: Path, tmp_path: Path, latencies: tuple[float, float], precision: str
) -> None:
    """The very file, and its own numbers: those of the two artifacts differ."""
    record = profiled(made, fp32=latencies[0], int8=latencies[1])
    loaded = optimize.load(made, plan=write_plan(record, tmp_path / "plan.json"))
    runner: Any = loaded[COMPONENT].runner()
    artifact = loaded.bundle.manifest.artifacts[f"{COMPONENT}/{precision}"]
    assert runner.path == loaded.bundle.path(artifact)
    outputs = {p: output(loaded[COMPONENT].runner("onnxruntime", p)) for p in ("fp32", "int8")}
    assert not torch.equal(outputs["fp32"], outputs["int8"])
    assert torch.equal(output(runner), outputs[precision])


def test_words_go_before_the_plan_and_without_one_nothing_changes(made: Path) -> None:
    loaded, plain = optimize.load(made, plan=profiled(made, fp32=63.0, int8=31.0)), optimize.load(made)
    named: Any = loaded[COMPONENT].runner(precision="fp32")
    default: Any = plain[COMPONENT].runner()
    assert named.path == default.path and named.path.name == f"{COMPONENT}.fp32.onnx"


def test_a_module_is_deployed_in_a_precision_that_the_bundle_has_no_artifact_of(made: Path) -> None:
    part = Part(backend="eager", precision="bf16")
    loaded = optimize.load(made, plan=plan_with(parts={COMPONENT: part}))
    runner = loaded[COMPONENT].runner()
    assert runner.name == "eager" and output(runner).dtype == torch.bfloat16


def test_a_measured_profile_becomes_a_plan_that_runs(made: Path, tmp_path: Path) -> None:
    """From the verb to the answer, with nothing by hand."""
    words: dict[str, Any] = {"backends": ["eager", "onnxruntime"], "rounds": 3, "burst_ms": 7, "attempts": 1}
    record = optimize.profile(
        made, **words, samples=0, threads=1, operators="none", isolated=False, report=tmp_path / "r"
    )
    assert record.choice is not None
    (pick,) = record.choice.picks
    plan = plan_of(record)
    assert plan.threads in (0, 1) and plan.parts[COMPONENT].artifact == pick.artifact
    exact = output(optimize.load(made)[COMPONENT].runner("eager", "fp32"))
    found = output(optimize.load(made, plan=record)[COMPONENT].runner())
    assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.99


# --- refused ----------------------------------------------------------------------------------------------------------


def test_an_artifact_that_was_made_again_is_refused(copied: Path) -> None:
    plan = plan_of(profiled(copied, int8=31.0))
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["artifacts"][f"{COMPONENT}/int8"]["sha256"] = "0" * 64
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(GateError, match=r"not in the bundle any more\n  got: text_encoder/int8: sha256 000") as e:
        optimize.load(copied, plan=plan)
    assert e.value.expected == f"sha256 {plan.parts[COMPONENT].sha256}" and e.value.mend
    del manifest["artifacts"][f"{COMPONENT}/int8"]
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(GateError, match=r"got: text_encoder/int8: none"):
        optimize.load(copied, plan=plan)


def test_a_file_that_was_changed_is_refused_before_it_runs(copied: Path) -> None:
    loaded = optimize.load(copied, plan=profiled(copied, int8=31.0))
    path = copied / COMPONENT / f"{COMPONENT}.int8.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(GateError, match="not the file that was proved"):
        loaded[COMPONENT].runner()


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"source": "elsewhere"}, InputError, r"another bundle\n  got: elsewhere\n  expected: demo"),
        ({"parts": {"unet": Part(backend="eager", precision="fp32")}}, InputError, "no component unet"),
        ({"parts": {COMPONENT: Part(backend="onnx-rt", precision="fp32")}}, InputError, "unknown backend onnx-rt"),
        (
            {"parts": {COMPONENT: Part(backend="tensorrt", precision="fp32", artifact="x", sha256="y")}},
            MissingError,
            r"runs text_encoder on tensorrt, which is not here\n  got: tensorrt does not run on cpu",
        ),
        (
            {"parts": {COMPONENT: Part(backend="aoti", precision="fp32")}},
            MissingError,
            r"made for the profile alone[\s\S]*optimize export demo .* --precision fp32 --format aoti",
        ),
    ],
)
def test_plans_that_cannot_be_deployed_here(made: Path, changes: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        optimize.load(made, plan=plan_with(**changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="skipped: needs a machine without a GPU")
def test_a_plan_of_a_gpu_is_refused_without_one(made: Path) -> None:
    with pytest.raises(MissingError, match="torch sees no GPU"):
        optimize.load(made, plan=plan_with(device="cuda", machine="NVIDIA H200, driver 570"))


def test_another_machine_of_the_same_kind_is_warned_of(made: Path, recwarn: pytest.WarningsRecorder) -> None:
    optimize.load(made, plan=plan_with())
    assert not [w for w in recwarn if "the plan's figures" in str(w.message)]
    with pytest.warns(UserWarning, match="figures are of A faster CPU, 63 cores, and this is") as warned:
        optimize.load(made, plan=plan_with(machine="A faster CPU, 63 cores"))
    assert warned[0].filename == __file__, "it points at the caller"


def test_a_component_that_the_plan_says_nothing_of_has_no_runner_unasked(made: Path) -> None:
    loaded = optimize.load(made, plan=plan_with(parts={}))
    with pytest.raises(InputError, match=f"says nothing of {COMPONENT}"):
        loaded[COMPONENT].runner()
    assert output(loaded[COMPONENT].runner("onnxruntime", "fp32")).shape[:2] == (1, 7)


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_from_its_file_and_from_its_profiles(made: Path, tmp_path: Path) -> None:
    record = profiled(made, slo=("p95<1s",), fp32=63.0, int8=31.0)
    plan = plan_of(record)
    assert plan.met and plan.wishes == ("p95<1000ms",) and plan.machine == HERE.key and plan.made == record.made
    part = plan.parts[COMPONENT]
    assert (part.backend, part.precision, part.artifact) == ("onnxruntime", "int8", f"{COMPONENT}/int8") and part.why
    written = write_plan(record, tmp_path / "a" / "plan.json")
    for what in (plan, record, written, str(written), write_profile(record, tmp_path / "profile.json")):
        assert plan_from(what) == plan


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is no plan"),
        ("{", "is no plan"),
        ("[7]", "no schema_version"),
        ("{}", "no schema_version"),
        ('{"schema_version": 7}', "schema_version 7"),
        ('{"schema_version": 1, "source": 63}', r"got: source: "),
        ('{"rows": []}', "no profile of this version"),
    ],
)
def test_other_files_are_no_plans(made: Path, tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=rf"plan\.json[\s\S]*{said}"):
        optimize.load(made, plan=path)


def test_a_profile_without_an_answer_makes_no_plan() -> None:
    with pytest.raises(InputError, match="no answer to make a plan of"):
        plan_of(a_profile())


def test_a_plan_that_meets_no_wish_or_contradicts_itself_is_refused(made: Path) -> None:
    with pytest.raises(GateError, match="does not meet the wishes"):
        optimize.load(made, plan=plan_with(met=False, wishes=("p95<1us",)))
    part = plan_of(profiled(made, fp32=63.0)).parts[COMPONENT]
    with pytest.raises(InputError, match="contradicts itself"):
        optimize.load(made, plan=plan_with(parts={COMPONENT: part.model_copy(update={"precision": "int8"})}))
    with pytest.raises(InputError, match="this is no plan"):
        optimize.load(made, plan={})
