"""`optimize quantize`: receipts whose counts agree, budgets that are met or refused, and sabotage that is caught."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import optimize
from optimize import quantizing
from optimize.compile.records import Receipt
from optimize.errors import GateError, InputError
from optimize.quantize import calibrate as calibrating
from optimize.quantize import place, sensitivity
from optimize.quantize.scales import Grid, Histogram
from optimize.tools.cli import main

COMPONENT = "text_encoder"
SMALL: dict[str, Any] = {"components": [COMPONENT], "samples": 8}
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="skipped: needs tensorrt-rtx")


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


def receipt_in(bundle: Path, id_: str = f"{COMPONENT}/int8") -> Receipt:
    receipt = optimize.Bundle.read(bundle).manifest.artifacts[id_].receipt
    assert receipt is not None
    return receipt


def test_counts_agree_and_every_layer_has_its_precision_and_reason(bundle: Path) -> None:
    optimize.quantize(bundle, **SMALL)
    receipt = receipt_in(bundle)
    assert receipt.chosen == receipt.calibrated == receipt.exported == receipt.kernels == 12
    assert receipt.found == len(receipt.layers) == 14
    assert all(x.precision == "int8" or (x.precision == "fp32" and x.why) for x in receipt.layers)
    assert receipt.quality and all(q.cosine >= 0.999 for q in receipt.quality)
    assert receipt.latency is not None and receipt.headline
    assert receipt.bytes_quantized < receipt.bytes_base
    assert all(v.state == "passed" for v in optimize.verify(bundle, components=[COMPONENT]))


def test_the_artifact_runs_and_a_second_run_keeps_it(bundle: Path) -> None:
    made = optimize.quantize(bundle, **SMALL).manifest.artifacts[f"{COMPONENT}/int8"]
    again = optimize.quantize(bundle, **SMALL).manifest.artifacts[f"{COMPONENT}/int8"]
    assert made == again  # its receipt has latencies, which a second making would not repeat
    with optimize.load(bundle)[COMPONENT].runner("onnxruntime", "int8") as runner:
        outputs = runner.infer({"input_ids": torch.zeros(3, 7, dtype=torch.int64)})
    assert outputs["last_hidden_state"].shape[:2] == (3, 7)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weight", "int4-weight", "fp8"])
def test_other_schemes_have_receipts_too(bundle: Path, scheme: str) -> None:
    optimize.quantize(bundle, scheme=scheme, budgets=["cosine>=0.97"], **SMALL)
    receipt = receipt_in(bundle, f"{COMPONENT}/{scheme}")
    assert receipt.chosen == receipt.exported == (14 if scheme == "fp8" else 12)
    assert receipt.kernels == (None if scheme == "fp8" else receipt.chosen)
    with optimize.load(bundle)[COMPONENT].runner("onnxruntime", scheme) as runner:
        outputs = runner.infer({"input_ids": torch.zeros(1, 5, dtype=torch.int64)})
    assert outputs and all(t.isfinite().all() for t in outputs.values())


def test_export_takes_a_scheme_as_a_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "demo", "--component", COMPONENT, "--precision", "int8", "--samples", "4"]
    assert main([*words, "--out", str(tmp_path / "b"), "--dry-run"]) == 0
    assert "text_encoder/int8" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "b")]) == 0
    assert "fp32's latency" in capsys.readouterr().out
    assert set(receipt_in(tmp_path / "b").model_dump()) >= {"found", "chosen", "calibrated", "exported", "kernels"}


@pytest.mark.parametrize("words", [["--kernels"], ["--opset", "18", "--block", "32"]])
def test_an_export_that_could_not_be_quantized_writes_nothing(tmp_path: Path, words: list[str]) -> None:
    assert main(["export", "demo", "--precision", "int8-weight", "--out", str(tmp_path / "b"), *words]) == 2
    assert not (tmp_path / "b").exists()


def test_a_dry_run_shows_each_layer_and_writes_nothing(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p for p in bundle.rglob("*"))
    words = ["quantize", str(bundle), "--component", COMPONENT, "--keep-high", "*mlp.fc2"]
    assert main([*words, "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["precision"] for r in rows if r["layer"].endswith("fc2")] == ["fp32", "fp32"]
    assert all("--keep-high" in r["why"] for r in rows if r["layer"].endswith("fc2"))
    assert sorted(p for p in bundle.rglob("*")) == before


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_a_budget_leaves_the_worst_layers_high_with_the_reason(bundle: Path) -> None:
    optimize.quantize(bundle, **SMALL)
    plain = receipt_in(bundle)
    limit = min(q.snr for q in plain.quality) + 3
    optimize.quantize(bundle, budgets=[f"snr>={limit}"], **SMALL)
    receipt = receipt_in(bundle)
    assert all(q.snr >= limit for q in receipt.quality)
    assert 0 < receipt.chosen < plain.chosen
    high = [x for x in receipt.layers if "sensitivity" in x.why]
    assert len(high) == plain.chosen - receipt.chosen
    assert all(x.error is not None and x.gain is not None for x in high)


def test_a_budget_that_cannot_be_met_says_how_near_it_came(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(bundle), "--component", COMPONENT, "--samples", "4", "--budget", "snr>=200"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "cannot meet snr>=200" in said and "dB" in said and "self_attn" in said
    assert f"{COMPONENT}/int8" not in optimize.Bundle.read(bundle).manifest.artifacts


def test_the_largest_set_is_found_by_bisection_and_checked_as_a_whole() -> None:
    ranked = [sensitivity.Effect(f"l{i}", 1 / (i + 1), 1.0) for i in range(63)]
    for enough in (1, 7, 62, 63):
        seen: list[int] = []

        def whole(high: Any, enough: int = enough, seen: list[int] = seen) -> float:
            seen.append(len(high))
            return len(high) - enough

        found = sensitivity.largest_set(ranked, whole, lambda v: v >= 0, -1)
        assert found.met and len(found.high) == enough and len(seen) <= 8
    assert not sensitivity.largest_set(ranked, lambda _: -1.0, lambda v: v >= 0, -1).met
    assert sensitivity.largest_set(ranked, lambda _: -1.0, lambda v: v >= 0, 1).high == ()


def test_sensitivity_is_what_quantizing_that_layer_alone_does(bundle: Path) -> None:
    """Against the graph with only that layer quantized."""
    path = bundle / COMPONENT / f"{COMPONENT}.fp32.onnx"
    feeds = [{"input_ids": torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(i))} for i in range(2)]
    from optimize.quantize.running import NO_QDQ, GraphSession, session_options
    from optimize.quantize.schemes import SCHEMES
    from optimize.quantize.sites import planned, sites_of

    sites = planned(sites_of(ir.load(path)), SCHEMES["int8"], "onnxruntime")
    p = place.Placement(SCHEMES["int8"], "onnxruntime", "minmax", sites)
    samples = Given(feeds)
    p = dataclasses.replace(p, calibration=calibrating.calibrate(ir.load(path), path.parent, p.taps(), samples))
    effects = {e.site: e for e in sensitivity.effects(ir.load(path), path.parent, p, feeds)}
    exact = [GraphSession(ir.load(path), path.parent).run(f) for f in feeds]
    for name in list(effects)[::5]:
        alone = [dataclasses.replace(s, stays="" if s.name == name else "left out") for s in sites]
        graph = place.placed(ir.load(path), dataclasses.replace(p, sites=alone))
        session = GraphSession(graph, path.parent, options=session_options(None, 0, **{NO_QDQ: "1"}))
        got = [session.run(f) for f in feeds]
        errors = []
        for output, tensor in exact[0].items():
            if tensor.is_floating_point():
                difference = torch.cat([(g[output] - e[output]).flatten() for g, e in zip(got, exact, strict=True)])
                size = torch.cat([e[output].flatten() for e in exact])
                errors.append(float(difference.norm() / size.norm()))
        assert effects[name].error == pytest.approx(max(errors), rel=0.02)


class Given(list[dict[str, torch.Tensor]]):
    def digest(self) -> str:
        return "given"


def test_sensitivity_is_told_of_an_artifact_that_is_there(bundle: Path) -> None:
    optimize.quantize(bundle, **SMALL)
    assert all(x.error is None for x in receipt_in(bundle).layers)
    optimize.quantize(bundle, sensitivity=True, **SMALL)
    told = receipt_in(bundle)
    assert sum(x.error is not None for x in told.layers) == told.chosen
    optimize.quantize(bundle, **SMALL)
    assert receipt_in(bundle) == told  # it is of the same graph


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_sensitivity_of_an_fp16_base_and_attention_that_goes_first(bundle: Path, scheme: str) -> None:
    """Errors are fed in the base's type. What has no weight has no figure, and is left high before all others."""
    words: dict[str, Any] = {"scheme": scheme, "runtime": "tensorrt", "sensitivity": True, **SMALL}
    optimize.quantize(bundle, budgets=["cosine>=0.9"], **words)
    id_ = next(i for i, a in optimize.Bundle.read(bundle).manifest.artifacts.items() if a.receipt)
    plain = receipt_in(bundle, id_)
    assert plain.base == f"{COMPONENT}/fp16" and all(
        x.error is not None for x in plain.layers if x.kind == "linear" and not x.why
    )
    optimize.quantize(bundle, budgets=[f"snr>={min(q.snr for q in plain.quality) + 0.01}"], **words)
    high = [x for x in receipt_in(bundle, id_).layers if "sensitivity" in x.why]
    assert high and (scheme == "int8" or {x.kind for x in high} >= {"attention"})


def test_the_sensitivity_cache_is_of_one_graph_and_block(bundle: Path) -> None:
    from optimize.quantize.schemes import SCHEMES, with_block
    from optimize.quantize.sites import planned, sites_of

    model = ir.load(bundle / COMPONENT / f"{COMPONENT}.fp32.onnx")
    scheme = SCHEMES["int4-weight"]
    sites = planned(sites_of(model), scheme, "onnxruntime")
    placements = [place.Placement(with_block(scheme, block), "onnxruntime", "mse", sites) for block in (32, 128)]
    keys = {sensitivity.digest_of(graph, p, sites, []) for graph in ("a", "b") for p in placements}
    assert len(keys) == 4


# --- calibration -----------------------------------------------------------------------------------------------------


class Interrupted(Given):
    """Stops at the sample `at`, once."""

    at = 11

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for i, feeds in enumerate(super().__iter__()):
            if i == self.at:
                self.at = -1
                raise KeyboardInterrupt
            yield feeds


def test_an_interrupted_calibration_goes_on_and_ends_with_the_same_figures(bundle: Path, tmp_path: Path) -> None:
    path = bundle / COMPONENT / f"{COMPONENT}.fp32.onnx"
    rng = torch.Generator().manual_seed(0)
    feeds = [{"input_ids": torch.randint(0, 20, (1, 5), generator=rng)} for _ in range(17)]
    tap = "encoder.layers.0.mlp.activation_fn/Mul"
    names = {str(v.name) for n in ir.load(path).graph for v in n.outputs}
    taps = [tap if tap in names else sorted(n for n in names if "mlp" in n)[0]]
    cache, samples = tmp_path / "cache.npz", Interrupted(feeds)
    with pytest.raises(KeyboardInterrupt):
        calibrating.calibrate(ir.load(path), path.parent, taps, samples, cache=cache)
    told: list[str] = []
    resumed = calibrating.calibrate(ir.load(path), path.parent, taps, samples, cache=cache, say=told.append)
    assert told[0] == "calibrating: sample 9 of 17"  # eight were on disk
    whole = calibrating.calibrate(ir.load(path), path.parent, taps, Given(feeds))
    for name in taps:
        assert np.array_equal(resumed.seen[name].histogram.counts, whole.seen[name].histogram.counts)
    cache.write_bytes(cache.read_bytes()[:100])  # a broken cache is no cache
    again = calibrating.calibrate(ir.load(path), path.parent, taps, Given(feeds), cache=cache)
    assert again.samples == 17
    told.clear()
    calibrating.calibrate(
        ir.load(path), path.parent, taps, Given(feeds), cache=cache, graph="new weights", say=told.append
    )
    assert len(told) == 17, "what another graph's values were is nothing to go by"


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"ids": np.zeros((1, 7), np.int64)}, "input_ids"),
        ({"input_ids": np.zeros((1, 7), np.float32)}, "input_ids"),
        ({"input_ids": np.zeros((1, 7, 3, 2), np.int64)}, "input_ids"),
    ],
)
def test_calibration_data_of_another_kind_are_refused(bundle: Path, tmp_path: Path, arrays: Any, said: str) -> None:
    np.savez(tmp_path / "feeds.npz", **arrays)
    with pytest.raises(InputError, match=said):
        optimize.quantize(bundle, calibration=tmp_path / "feeds.npz", **SMALL)


def test_words_that_make_no_sense_are_refused(bundle: Path) -> None:
    for words, said in (
        ({"scheme": "int3"}, "unknown scheme"),
        ({"runtime": "openvino"}, "unknown runtime"),
        ({"method": "magic"}, "unknown calibration method"),
        ({"samples": 0}, "calibration needs samples"),
        ({"budgets": ["ssim>=1"]}, "budget"),
        ({"scheme": "fp8", "targets": ["sm86"]}, "cannot run on SM86"),
        ({"keep": ["nothing.like.it"]}, "no layer matches"),
        ({"components": ["nothing"]}, "unknown component"),
    ):
        with pytest.raises(InputError, match=said):
            optimize.quantize(bundle, **{**SMALL, **words})


# --- sabotage --------------------------------------------------------------------------------------------------------


def drop_one(original: Callable[..., None]) -> Callable[..., None]:
    def site(self: Any, node: Any, s: Any) -> None:
        if not s.module.endswith("layers.0.mlp.fc2"):
            original(self, node, s)

    return site


def test_a_layer_whose_qdq_is_dropped_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.Builder, "site", drop_one(place.Builder.site))
    with pytest.raises(GateError, match=r"counts do not agree[\s\S]*layers.0.mlp.fc2/MatMul: no Q/DQ in the file"):
        optimize.quantize(bundle, **SMALL)


def test_scales_of_zero_are_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.Placement, "grid", lambda *_: Grid(0.0))
    with pytest.raises(GateError):
        optimize.quantize(bundle, **SMALL)


def test_a_calibration_that_was_skipped_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing seen: an error. Something made up in its place: the figures are far off. Another calibration's ranges,
    right or not: the receipt says so."""
    real = calibrating.calibrate
    empty = calibrating.Calibration({}, 0, "")
    monkeypatch.setattr(calibrating, "calibrate", lambda *_, **__: empty)
    with pytest.raises(InputError, match="was not calibrated"):
        optimize.quantize(bundle, smooth=False, **SMALL)

    def made_up(model: Any, folder: Any, taps: list[str], *_: Any, **__: Any) -> calibrating.Calibration:
        histogram = Histogram()
        histogram.add(torch.tensor([0.01]))
        return calibrating.Calibration({t: calibrating.Seen(histogram) for t in taps}, 1, "")

    monkeypatch.setattr(calibrating, "calibrate", made_up)
    for budget, said in (("cosine>=0.999", "cannot meet|counts do not agree|far off"), ("cosine>=-1", "far off")):
        with pytest.raises(GateError, match=said):
            optimize.quantize(bundle, smooth=False, budgets=[budget], **SMALL)

    def other(*args: Any, **words: Any) -> calibrating.Calibration:
        return dataclasses.replace(real(*args, **words), digest="sha256:other")

    monkeypatch.setattr(calibrating, "calibrate", other)
    with pytest.raises(GateError, match=r"counts do not agree[\s\S]*not of these samples"):
        optimize.quantize(bundle, smooth=False, **SMALL)


def test_verify_finds_a_quantized_graph_that_was_changed(bundle: Path) -> None:
    """Somebody swaps the file and its digest: the receipt still tells."""
    optimize.quantize(bundle, **SMALL)
    base = bundle / COMPONENT / f"{COMPONENT}.fp32.onnx"
    quantized = bundle / COMPONENT / f"{COMPONENT}.int8.onnx"
    shutil.copyfile(base, quantized)
    manifest = json.loads((bundle / "manifest.json").read_text())
    entries = manifest["artifacts"]
    for field in ("bytes", "sha256"):
        entries[f"{COMPONENT}/int8"][field] = entries[f"{COMPONENT}/fp32"][field]
    entries[f"{COMPONENT}/int8"]["parents"] = entries[f"{COMPONENT}/fp32"]["parents"] + [f"{COMPONENT}/fp32"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    failed = [v for v in optimize.verify(bundle, components=[COMPONENT]) if v.state == "failed"]
    assert [v.artifact for v in failed] == [f"{COMPONENT}/int8"]
    assert "not those of its receipt" in failed[0].detail


# --- engines ---------------------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_an_engine_has_every_layer_of_the_receipt(bundle: Path, scheme: str) -> None:
    optimize.quantize(bundle, scheme=scheme, runtime="tensorrt", budgets=["cosine>=0.99"], **SMALL)
    optimize.build(bundle, targets=["sm89"], components=[COMPONENT], precisions=[scheme])
    artifacts = optimize.Bundle.read(bundle).manifest.artifacts
    (engine,) = [a for a in artifacts.values() if a.kind == "engine"]
    assert engine.spec["quantized"] == 12


@needs_rtx
def test_an_engine_that_lost_a_layer_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimize.quantize(bundle, runtime="tensorrt", **SMALL)
    from optimize.quantize import receipt

    real = receipt.layers_in_engine
    monkeypatch.setattr(receipt, "layers_in_engine", lambda *args: set(list(real(*args))[1:]))
    with pytest.raises(GateError, match="computes quantized layers in floating point"):
        optimize.build(bundle, targets=["sm89"], components=[COMPONENT], precisions=["int8"])


def test_a_graph_placed_for_onnx_runtime_becomes_no_engine(bundle: Path) -> None:
    optimize.quantize(bundle, **SMALL)
    with pytest.raises(InputError, match="no ONNX artifact to build from"):
        optimize.build(bundle, targets=["sm89"], components=[COMPONENT], precisions=["int8"])


def test_an_output_that_agrees_in_every_bit_does_not_break_the_manifest(bundle: Path) -> None:
    """Its SNR is infinite, for which JSON has no number."""
    made = optimize.quantize(bundle, **SMALL).manifest.artifacts[f"{COMPONENT}/int8"]
    assert made.receipt is not None
    exact = made.receipt.quality[0].model_copy(update={"snr": math.inf, "psnr": math.inf})
    receipt = made.receipt.model_copy(update={"quality": [exact]})
    with optimize.Bundle.create(bundle, "demo", []) as again:
        again.record(made.model_copy(update={"receipt": receipt}))
    assert receipt_in(bundle).quality[0].snr == math.inf


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_of_samples_that_calibration_has_not_seen(bundle: Path) -> None:
    from optimize.quantize.sets import content_digest, read_set

    optimize.quantize(bundle, components=[COMPONENT], samples=32)
    sets = [read_set(bundle / "calibration" / f"{COMPONENT}.{kind}") for kind in ("samples", "held-out")]
    seen, held = ({content_digest(f) for f in found} for found in sets)
    assert receipt_in(bundle).quality[0].samples == len(held - seen) == 2
    alone = quantizing.apart(sets[0], sets[0])
    assert all(s not in alone[0].samples for s in alone[1].samples)
    assert len(alone[0]) + len(alone[1]) == len(sets[0])


def test_a_sample_that_agrees_in_every_bit_meets_no_budget_for_the_others() -> None:
    from optimize.receipts import compared

    one = torch.linspace(-1, 1, 63)
    feeds = [{"y": one}, {"y": 2 * one}]
    (found,) = compared(lambda f: f, lambda f: {"y": f["y"] + (0.5 if f["y"][-1] > 1 else 0)}, feeds)
    assert found.snr < 20 and found.psnr < 20
    (broken,) = compared(lambda f: f, lambda f: {"y": f["y"] * (float("nan") if f["y"][-1] > 1 else 1)}, feeds)
    assert np.isnan(broken.lowest) and quantizing.margin([broken], []) == float("-inf")


def test_a_plan_of_nothing_is_shown_and_its_quantizing_refused(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", str(bundle), "--component", COMPONENT, "--keep-high", "*"]
    assert main([*words, "--dry-run"]) == 0 and "--keep-high" in capsys.readouterr().out
    assert main(words) == 1 and "--dry-run shows why" in capsys.readouterr().err


def test_an_export_quantizes_the_graph_of_its_opset(bundle: Path) -> None:
    request = quantizing.request_from_words(bundle, opset=21)
    with pytest.raises(InputError, match="of opset 21"):
        quantizing.base_of(optimize.Bundle.read(bundle), COMPONENT, request)
