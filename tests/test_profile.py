"""`optimize profile`: rows that are proved, sabotage that is caught, a run that is killed, words that make no sense."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from profile_records import a_profile

import optimize
from optimize import measuring, profiling
from optimize.compile import backends
from optimize.compile.runners import OnnxRuntimeRunner, check_placement
from optimize.errors import InputError, MissingError
from optimize.profiles.reading import profile_from_file, write_profile
from optimize.profiles.schema import Profile, Row
from optimize.tools.cli import main

QUICK: dict[str, Any] = {"rounds": 3, "burst_ms": 5.0, "attempts": 1, "samples": 2, "operators": "none"}
ODD = "odd=batch:3,tokens:7"
FACTORY = """
import os, signal
import torch
from torch import nn
from optimize.compile.spec import Axis, Component, TensorSpec

class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(63, 77), nn.Linear(77, 63)

    def forward(self, x):
        if x.dtype == torch.bfloat16:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.two(torch.nn.functional.silu(self.one(x)))

def mixer():
    torch.manual_seed(0)
    return Component.from_module(Mixer(), [TensorSpec("x", ("batch", 63))], ["y"], [Axis("batch", 1, 7, 199)])
"""
SOURCE = "python:profile_factories:mixer"


@pytest.fixture(scope="module")
def mixers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("factories")
    (folder / "profile_factories.py").write_text(FACTORY)
    sys.path.insert(0, str(folder))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("profile_factories", None)
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with its text encoder in int8 too. Its record is written by the first test that profiles it."""
    folder = Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("profile") / "bundle"))
    optimize.quantize(folder, components=["text_encoder"], samples=8)
    return folder


@pytest.fixture(scope="module")
def found(bundle: Path) -> Profile:
    """Three candidates of the text encoder in processes of their own, at its middle sizes and at odd ones."""
    result = optimize.profile(
        bundle, components=["text_encoder"], backends=["eager", "onnxruntime"], shapes=["opt", ODD], **QUICK
    )
    assert isinstance(result, Profile)
    return result


def row_of(record: Profile, candidate: str, shape: str | None = None) -> Row:
    return next(r for r in record.rows if r.candidate == candidate and shape in (None, r.shape))


def in_process(bundle: Path, *names: str, **words: Any) -> Profile:
    """Two candidates in this process, where a test can sabotage them."""
    record = optimize.profile(
        bundle, components=["text_encoder"], backends=names, precisions=["fp32"], isolated=False, **{**QUICK, **words}
    )
    assert isinstance(record, Profile)
    return record


# --- what a record has -----------------------------------------------------------------------------------------------


def test_every_row_is_proved_and_has_its_figures(found: Profile) -> None:
    names = {(r.candidate, r.shape) for r in found.rows}
    expected = {f"{b} {p}" for b, p in (("eager", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "int8"))}
    assert names >= {(name, shape) for name in expected for shape in ("opt", "odd")}
    for row in found.rows:
        if row.candidate in expected:
            assert row.state in ("measured", "inconclusive") and row.timing and row.parity and row.ratio
            assert row.parity.passed and row.parity.relative <= row.parity.limit
            assert len(row.timing.rounds_ms) == 3 and row.timing.p10_ms <= row.timing.p90_ms
            assert row.preparation and row.preparation.first_ms > 0 and row.memory and row.memory.host
            assert row.work and row.work.flops > 0 and row.roofline and row.roofline.share > 0
            assert row.quality and row.quality.cosine > 0.999
    assert row_of(found, "eager fp32").ratio and row_of(found, "eager fp32").ratio.value == 1.0  # type: ignore[union-attr]
    assert row_of(found, "onnxruntime int8").artifact == "text_encoder/int8"
    odd = row_of(found, "onnxruntime fp32", "odd")
    assert odd.sizes == {"batch": 3, "tokens": 7}
    assert odd.throughput_per_s == pytest.approx(3e3 / odd.timing.median_ms)  # type: ignore[union-attr]


def test_the_quality_is_that_of_real_prompts(found: Profile) -> None:
    int8, fp32 = (row_of(found, f"onnxruntime {p}").quality for p in ("int8", "fp32"))
    assert int8 and fp32 and "recorded from" in int8.data and int8.samples == 2
    assert int8.snr_db < fp32.snr_db and int8.cosine < fp32.cosine


def test_what_was_not_asked_for_and_cannot_run_is_skipped_with_its_reason(found: Profile) -> None:
    fp16 = row_of(found, "onnxruntime fp16")
    assert fp16.state == "skipped" and "--precision fp16" in fp16.why and fp16.timing is None


def test_the_bundle_keeps_the_record_and_nothing_else(bundle: Path, found: Profile) -> None:
    folder = bundle / profiling.FOLDER
    assert sorted(p.name for p in folder.iterdir()) == ["profile.json"]
    assert profile_from_file(folder) == found
    assert found.machine.versions["torch"] == torch.__version__ and found.machine.cores
    assert all(v.state == "passed" for v in optimize.verify(bundle, components=["text_encoder"]))


def test_the_answer_is_one_of_the_rows_and_plain_rows_have_them_all(found: Profile) -> None:
    assert found.choice is not None and found.choice.met
    (pick,) = found.choice.picks
    assert row_of(found, f"{pick.backend} {pick.precision}").timing is not None and pick.why
    table = found.as_pandas()
    assert len(table) == len(found.rows) == len(found.as_rows())
    assert set(table["component"]) == {"text_encoder"} and table["median_ms"].notna().any()


def test_torch_compile_is_measured_with_its_compile_time_apart(mixers: None) -> None:
    record = optimize.profile(
        SOURCE, backends=["eager", "torch.compile"], trust_remote_code=True, isolated=False, **QUICK
    )
    row = row_of(record, "torch.compile fp32")
    assert row.timing and row.preparation and row.preparation.compile_s is not None
    assert 1e3 * row.preparation.compile_s > 10 * row.preparation.first_ms  # compiling is no part of the first run
    assert row.work and row.work.flops == pytest.approx(2 * 7 * 2 * 63 * 77, rel=0.1)


# --- sabotage --------------------------------------------------------------------------------------------------------


def sabotaged(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Any], Any]) -> None:
    """Every ONNX Runtime runner's bound run goes through `change(run, feeds)`."""
    bind = OnnxRuntimeRunner.bind

    def bound(self: OnnxRuntimeRunner, feeds: Any) -> Any:
        return change(bind(self, feeds), feeds)

    monkeypatch.setattr(OnnxRuntimeRunner, "bind", bound)


def test_a_sleep_in_a_backend_is_seen_and_loses(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotaged(monkeypatch, lambda run, _: lambda: (time.sleep(0.3), run())[1])
    record = in_process(bundle, "eager", "onnxruntime")
    slow, eager = row_of(record, "onnxruntime fp32"), row_of(record, "eager fp32")
    assert slow.timing and eager.timing and slow.timing.median_ms >= 300 > eager.timing.median_ms
    assert slow.ratio and slow.ratio.value > 1
    assert record.choice and record.choice.picks[0].backend == "eager"


def test_a_wrong_output_is_never_timed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotaged(monkeypatch, lambda run, _: lambda: {n: t * 1.001 for n, t in run().items()})
    record = in_process(bundle, "eager", "onnxruntime")
    row = row_of(record, "onnxruntime fp32")
    assert row.state == "failed" and row.why.startswith("wrong numbers") and row.timing is None
    assert row.parity and not row.parity.passed and row.parity.relative == pytest.approx(1e-3, rel=0.01)
    assert record.choice and record.choice.picks[0].backend == "eager"


def test_values_that_are_not_finite_fail_and_can_be_written(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotaged(monkeypatch, lambda run, _: lambda: {n: t / 0 for n, t in run().items()})
    record = in_process(bundle, "eager", "onnxruntime")
    assert row_of(record, "onnxruntime fp32").state == "failed"
    assert Profile.model_validate_json(record.model_dump_json()) == record


class Moved:
    """A session that says that it has a GPU's provider, with ONNX Runtime's own account of where its nodes are."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def test_nodes_on_another_provider_are_named(bundle: Path) -> None:
    path = bundle / "text_encoder" / "text_encoder.fp32.onnx"
    with OnnxRuntimeRunner(path) as runner:
        check_placement(runner._session, "CPUExecutionProvider", path)
        with pytest.raises(MissingError, match=r"would run \d+ nodes .* on another provider") as e:
            check_placement(Moved(runner._session), "CUDAExecutionProvider", path)
    assert "on CPUExecutionProvider" in str(e.value) and "(Gather)" in str(e.value)
    assert "(Shape)" not in str(e.value), "sizes are computed where sizes are: on the CPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="skipped: needs a machine without a GPU")
def test_a_whole_session_that_falls_back_is_refused(bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("skipped: needs onnxruntime-gpu")
    path = bundle / "text_encoder" / "text_encoder.fp32.onnx"
    with (
        pytest.raises(MissingError, match="fell back from CUDAExecutionProvider"),
        OnnxRuntimeRunner(path, "CUDAExecutionProvider"),
    ):
        pass


def test_a_backend_that_is_killed_is_a_row_and_the_others_go_on(mixers: None) -> None:
    record = optimize.profile(SOURCE, backends=["eager"], precisions=["fp32", "bf16"], trust_remote_code=True, **QUICK)
    dead = row_of(record, "eager bf16")
    assert dead.state == "failed" and "signal 9" in dead.why
    assert row_of(record, "eager fp32").timing


def test_outputs_that_are_not_finite_on_real_samples_are_a_failure(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random feeds are right: only the samples show it, and nothing may pick such a row."""
    from optimize.profiles import judging

    judged = judging.quality_of_row

    def broken(pairs: Any, data: str) -> Any:
        row = judged(pairs, data)
        return row.model_copy(update={"cosine": float("nan")}) if len(asked) > 1 else row

    asked: list[str] = []
    prepare = measuring.prepare
    monkeypatch.setattr(measuring, "prepare", lambda *args: (asked.append(args[2]), prepare(*args))[1])
    monkeypatch.setattr(judging, "quality_of_row", broken)
    record = in_process(bundle, "eager", "onnxruntime")
    row = row_of(record, "onnxruntime fp32")
    assert row.state == "failed" and "not finite on real samples" in row.why
    assert record.choice is not None and {p.backend for p in record.choice.picks} == {"eager"}


def test_an_error_after_the_measurement_loses_nothing(
    mixers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimize.profiles import operators

    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(operators, "breakdown_of", out_of_memory)
    words: dict[str, Any] = {"backends": ["eager"], "trust_remote_code": True, "isolated": False, **QUICK}
    record = optimize.profile(SOURCE, report=tmp_path / "r", **{**words, "operators": "picks"})
    assert any("no breakdown: RuntimeError: CUDA out of memory" in note for note in record.notes)
    assert profile_from_file(tmp_path / "r" / "profile.json").rows[0].timing


def test_a_backend_that_raises_says_so_in_its_row(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(subject: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 7.00 GiB")

    rows = {**backends.BACKENDS, "onnxruntime": replace(backends.BACKENDS["onnxruntime"], make=broken)}
    monkeypatch.setattr(backends, "BACKENDS", rows)
    record = in_process(bundle, "eager", "onnxruntime")
    row = row_of(record, "onnxruntime fp32")
    assert row.state == "failed" and "out of memory" in row.why and row_of(record, "eager fp32").timing


# --- a killed run ----------------------------------------------------------------------------------------------------


def test_a_killed_run_keeps_what_it_measured_and_goes_on(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {**QUICK, "backends": ["onnxruntime"], "precisions": ["fp32"], "isolated": False, "report": tmp_path / "r"}
    words |= {"components": ["text_encoder", "vae_decoder"]}
    asked: list[str] = []

    def rows_of(task: measuring.Task) -> list[Row]:
        asked.append(task.component.name)
        if asked.count("vae_decoder") == 1 and asked[-1] == "vae_decoder":
            partial = tmp_path / "r" / profiling.PARTIAL
            known = json.loads(partial.read_text())
            for entry in known.values():
                entry["load"] |= {"busy": True, "others": 0.77}
            partial.write_text(json.dumps(known))
            raise KeyboardInterrupt
        return measuring.rows_of(task)

    monkeypatch.setattr(profiling, "rows_of", rows_of)
    with pytest.raises(KeyboardInterrupt):
        optimize.profile(bundle, **words)
    assert not (tmp_path / "r" / "profile.json").exists() and (tmp_path / "r" / profiling.PARTIAL).exists()
    record = optimize.profile(bundle, **words)
    assert asked == ["text_encoder", "vae_decoder", "vae_decoder"]
    assert any("text_encoder: measured before this run was interrupted" in n for n in record.notes)
    assert {r.component for r in record.rows} == {"text_encoder", "vae_decoder"}
    assert record.load.busy and record.load.others == 0.77, "its rows were measured on a busy machine"
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["profile.json"]
    optimize.profile(bundle, **{**words, "seed": 1})
    assert asked[3:] == ["text_encoder", "vae_decoder"]  # nothing of a finished run is taken for another one's


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"backends": ["tensorflow"]}, "unknown backend tensorflow"),
        ({"shapes": ["big=batch:999"]}, "does not take batch of 999"),
        ({"shapes": ["big=pixels:7"]}, "no component has the axis pixels"),
        ({"shapes": ["big"]}, "--shape was not understood"),
        ({"shapes": ["a=batch:1", "a=batch:2"]}, "given twice"),
        ({"components": ["unets"]}, "no component unets"),
        ({"rounds": 1}, "--rounds is too small"),
        ({"burst_ms": 0.0}, "--burst is no time"),
        ({"burst_ms": float("inf")}, "--burst is no time"),
        ({"samples": -1}, "--samples is below zero"),
        ({"precisions": ["fp15"]}, "unknown precision fp15"),
        ({"threads": 9999}, "--threads does not fit this machine"),
        ({"seed": -1}, "--seed is below zero"),
        ({"steps": 0}, "--steps is too small"),
        ({"guidance": float("nan")}, "--guidance is no scale"),
        ({"quality": ["cosine>=2"]}, "what cannot be"),
        ({"load": "3/fortnight"}, "--load was not understood"),
        ({"operators": "some"}, "unknown word some"),
        ({"device": "tpu"}, "unknown device tpu"),
        ({"targets": ["rtx-9999"]}, "no sheet for the target"),
        ({"slo": ["fast"]}, "--slo was not understood"),
        ({"axes": ["batch=7"]}, "a bundle has its axes already"),
    ],
)
def test_words_that_make_no_sense_are_refused(bundle: Path, words: dict[str, Any], said: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(InputError, match=said):
        optimize.profile(bundle, **words)
    assert time.perf_counter() - begin < 20  # before anything is measured


def test_a_backend_that_is_not_here_is_a_row_with_its_reason(bundle: Path) -> None:
    record = in_process(bundle, "eager", "tensorrt", "onnxruntime-cuda")
    rows = {r.backend: r for r in record.rows}
    assert rows["tensorrt"].state == rows["onnxruntime-cuda"].state == "skipped"
    assert "does not run on cpu" in rows["tensorrt"].why


def test_a_dry_run_lists_the_candidates_and_measures_nothing(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(bundle), "--component", "unet", "--shape", "min", "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {r["backend"] for r in rows} >= {"eager", "onnxruntime"} and {r["do"] for r in rows} == {"measure"}
    assert "height=8" in rows[0]["sizes"]


def test_a_guided_pipeline_has_its_denoiser_at_twice_the_batch(bundle: Path) -> None:
    rows = optimize.profile(bundle, dry_run=True)
    sizes = {(r["component"], r["shape"]): r["sizes"] for r in rows}
    assert sizes["unet", "opt"] == "batch=1, height=32, width=32, tokens=16"  # as many as the demo's encoder gives
    assert sizes["unet", "opt+guided"].startswith("batch=2") and ("vae_decoder", "opt+guided") not in sizes


def test_the_command_prints_and_says_when_a_wish_is_not_met(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    words = ["profile", str(bundle), "--component", "text_encoder", "--backend", "onnxruntime", "--precision", "fp32"]
    words += ["--rounds", "3", "--burst", "3", "--attempts", "1", "--samples", "0", "--operators", "none"]
    assert main([*words, "--slo", "p95<1us", "--plan", str(plan)]) == 1
    said = capsys.readouterr()
    assert "text_encoder" in said.out and "is not written: nobody meets the wishes" in said.err and not plan.exists()
    assert main([*words, "--fail-on", "slower"]) == 2  # a gate that has lost its record does not pass
    assert main([*words, "--slo", "p95<1000s", "--json"]) == 0
    record = Profile.model_validate(json.loads(capsys.readouterr().out))
    assert record.choice and record.choice.met and record.choice.wishes
    assert "--slo 'p95<1000000ms'" in record.command and "--rounds 3" in record.command


def test_a_command_of_which_nothing_can_run_here_says_so(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", str(bundle), "--component", "text_encoder", "--backend", "tensorrt", "--operators", "none"]
    assert main(words) == 3
    assert "nothing that was asked for can run here" in capsys.readouterr().err


def test_what_a_killed_run_left_is_cleared_away(bundle: Path, tmp_path: Path) -> None:
    dead = tmp_path / f"{profiling.WORK}999999999-x"
    mine = tmp_path / f"{profiling.WORK}{os.getpid()}-x"
    dead.mkdir(), mine.mkdir()
    with profiling.workspace(tmp_path) as work:
        assert work.is_dir() and not dead.exists() and mine.exists()
    assert not work.exists()


def test_a_record_is_kept_where_the_older_one_cannot_be_compared(mixers: None, tmp_path: Path) -> None:
    write_profile(a_profile(), tmp_path / "old.json")
    words: dict[str, Any] = {"backends": ["eager"], "trust_remote_code": True, "isolated": False, **QUICK}
    with pytest.raises(InputError, match="of another machine"):
        optimize.profile(SOURCE, against=tmp_path / "old.json", report=tmp_path / "r", **words)
    kept = profile_from_file(tmp_path / "r" / "profile.json")
    assert kept.rows[0].timing is not None and kept.comparison is None
    assert (kept.settings.turn_ms, kept.settings.pace) == (25.0, 0.04)  # of a CPU


# --- functions -------------------------------------------------------------------------------------------------------


def test_functions_are_held_to_the_first_ones_outputs() -> None:
    weight = torch.randn(63, 77)
    functions: dict[str, Callable[..., Any]] = {
        "product": lambda x: x @ weight,
        "slow": lambda x: (time.sleep(0.005), x @ weight)[1],
        "wrong": lambda x: x @ weight + 1,
    }
    functions["broken"] = lambda x: x @ weight.T
    record = optimize.profile(functions, inputs=(torch.randn(7, 63),), **QUICK)
    rows = {r.component: r for r in record.rows}
    assert rows["broken"].state == "failed" and "RuntimeError" in rows["broken"].why
    assert rows["slow"].timing and rows["product"].timing and rows["slow"].timing.median_ms >= 5
    assert rows["slow"].ratio and rows["slow"].ratio.value > 1 and rows["product"].sizes == {"0.0": 7, "0.1": 63}
    assert rows["wrong"].state == "failed" and "wrong numbers" in rows["wrong"].why


@pytest.mark.parametrize(
    ("what", "words", "said"),
    [
        (lambda: None, {}, "gives no tensor"),
        ({"a": 3}, {}, "these are no functions"),
        (lambda x: x, {"inputs": 3}, "neither a sequence nor a mapping"),
        (lambda x: x, {"inputs": (torch.ones(1),), "backends": ["onnxruntime"]}, "does not take a function"),
        (lambda x: x / 0, {"inputs": (torch.zeros(1),)}, "outputs are not finite"),
        (lambda x: x, {"inputs": (torch.ones(1),), "precisions": ["fp16"]}, "precisions is for bundles"),
        (lambda x: x, {"inputs": (torch.ones(1),), "slo": ["p95<1ms"]}, "slo is for bundles"),
        (lambda x: x, {"inputs": (torch.ones(1),), "steps": 7}, "steps is for bundles"),
        (lambda x: x, {"inputs": (torch.ones(1),), "guidance": 0.0}, "guidance is for bundles"),
    ],
)
def test_functions_that_cannot_be_compared_are_refused(what: Any, words: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        optimize.profile(what, **{**QUICK, **words})


def test_what_the_first_function_raises_is_its_authors() -> None:
    """As it is, with its own cause: there is nothing to compare the others with."""

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("mine") from KeyError("its cause")

    with pytest.raises(ZeroDivisionError, match="mine") as raised:
        optimize.profile({"broken": broken, "right": lambda x: x}, inputs=(torch.ones(7),), **QUICK)
    assert isinstance(raised.value.__cause__, KeyError)
