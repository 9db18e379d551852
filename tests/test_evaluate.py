"""`optimize evaluate`: what is equal is perfect, disturbed weights are caught by every figure and by budgets, and
what was measured is recorded."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import optimize
from optimize.compile.digests import digest_of_file
from optimize.errors import GateError, InputError, MissingError
from optimize.profiles.quality import by_timestep, figures_of, mean, quality_of, timestep_of, worst
from optimize.tools.cli import main


def disturbed(demo: Path, folder: Path, noise: float) -> Path:
    """A copy of the demo whose `unet/fp16` is its `unet/fp32` with `noise` deviations of noise on every weight."""
    shutil.copytree(demo, folder)
    part = folder / "unet"
    for kind in ("onnx", "safetensors"):
        content = (part / f"unet.fp32.{kind}").read_bytes()
        (part / f"unet.fp16.{kind}").write_bytes(content.replace(b"unet.fp32.safetensors", b"unet.fp16.safetensors"))
    disturb(part / "unet.fp16.safetensors", noise)
    manifest = json.loads((folder / "manifest.json").read_text())
    artifacts = manifest["artifacts"]
    for id_ in [i for i in artifacts if i.startswith("unet/fp32")]:
        old = artifacts[id_]
        if old["kind"] not in ("onnx", "weights"):
            continue
        new = json.loads(json.dumps(old).replace("fp32", "fp16"))
        path = folder / new["path"]
        artifacts[new["id"]] = {**new, "bytes": path.stat().st_size, "sha256": digest_of_file(path, fresh=True)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def disturb(file: Path, noise: float) -> None:
    """In place: a safetensors file keeps its header, and with it where each weight lies."""
    content = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    rng = np.random.default_rng(0)
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            first, last = (start + at for at in entry["data_offsets"])
            values = np.frombuffer(content, np.float32, (last - first) // 4, first)
            values += (noise * values.std() * rng.standard_normal(values.shape)).astype(np.float32)
    file.write_bytes(content)


@pytest.fixture(scope="module")
def twin(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(bundle, its evaluation), undisturbed: 7 images in batches of 4 and 3."""
    folder = disturbed(demo_bundle, tmp_path_factory.mktemp("twin") / "demo", 0.0)
    return folder, optimize.evaluate(folder, samples=5, images=7)


def of_unet(found: Any) -> Any:
    return next(a for a in found.artifacts if a.artifact == "unet/fp16").outputs[0]


def test_what_is_equal_is_perfect_and_fp16_nearly(twin: tuple[Path, Any]) -> None:
    found = twin[1]
    assert [(a.artifact, a.against) for a in found.artifacts] == [
        ("text_encoder/fp16", "text_encoder/fp32"),
        ("unet/fp16", "unet/fp32"),
    ]
    figures = of_unet(found).figures
    assert figures["cosine"] == pytest.approx(1, abs=1e-12) and figures["ssim"] == 1
    assert figures["snr"] == figures["psnr"] == math.inf
    text = {o.output: o.figures for o in found.artifacts[0].outputs}
    assert set(text) == {"last_hidden_state", "pooler_output", "penultimate_hidden_state"}
    for output in text.values():
        assert "ssim" not in output and output["cosine"] > 1 - 1e-6 and 50 < output["snr"] < 90
    images = found.images[0]
    assert (images.variant, set(images.parts.values())) == (
        "fp16",
        {"text_encoder/fp16", "unet/fp16", "vae_decoder/fp32"},
    )
    assert 40 < images.figures.figures["image-psnr"] < math.inf  # the text's rounding alone
    assert images.figures.figures["read"] == images.figures.reference["read"] > 80
    assert len(images.drawing.seeds) == 7


def test_timesteps_have_rows(twin: tuple[Path, Any]) -> None:
    rows = of_unet(twin[1]).by_timestep
    assert len(rows) == 5 and list(rows) == sorted(rows, key=float, reverse=True)


def test_the_record_says_what_was_measured(twin: tuple[Path, Any]) -> None:
    folder, found = twin

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    files = {p.name: json.loads(p.read_text(), parse_constant=refuse) for p in folder.glob("quality/*.json")}
    assert set(files) == {"text_encoder.fp16.json", "unet.fp16.json", "images.fp16.json"}
    unet = files["unet.fp16.json"]
    assert unet["sha256"] == optimize.load(folder)["unet"].onnx("fp16").sha256
    assert unet["outputs"][0]["figures"]["snr"] == "inf" and "recorded from" in unet["data"]
    assert unet["asked"] == {"samples": 5, "images": 7, "seed": 1}
    assert {"torch", "onnx", "torchmetrics", "numpy"} <= set(unet["versions"])
    images = files["images.fp16.json"]
    assert images["drawing"]["seeds"] == list(range(1000, 1007)) and images["drawing"]["steps"] == 25
    assert images["figures"]["figures"]["fid"] == pytest.approx(found.images[0].figures.figures["fid"])
    assert not list(folder.glob("quality/.*"))  # outputs that were compared are gone


def test_a_disturbed_artifact_shows_everywhere(
    twin: tuple[Path, Any], demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two deviations of noise on the weights: every figure is worse than the twin's, and budgets fail the command."""
    folder = disturbed(demo_bundle, tmp_path / "demo", 2.0)
    words = ["evaluate", str(folder), "--samples", "5", "--images", "7", "--json"]
    budgets = ["cosine>=0.999", "cosine>=-1", "ssim>=0.9", "image-psnr>=30", "points-lost<=2", "clip-score>=1"]
    assert main([*words, *(w for b in budgets for w in ("--budget", b))]) == 1
    out = capsys.readouterr()
    found = json.loads(out.out)
    missed = [line.split(": ")[2] for line in out.err.splitlines() if "budget not met" in line]
    assert set(missed) == {"cosine>=0.999", "ssim>=0.9", "image-psnr>=30", "points-lost<=2", "clip-score>=1"}
    assert "cosine>=0.999: unet/fp16 out_sample: " in out.err and "text_encoder" not in out.err
    assert "clip-score>=1: images of fp16: not measured: needs --features" in out.err

    unet = next(a for a in found["artifacts"] if a["artifact"] == "unet/fp16")["outputs"][0]
    good = of_unet(twin[1])
    for name, value in unet["figures"].items():
        assert value < good.figures[name] and unet["worst"][name] <= value, name
    assert all(row["cosine"] < 0.999 for row in unet["by_timestep"].values())
    bad, better = found["images"][0]["figures"]["figures"], twin[1].images[0].figures.figures
    for name in ("image-psnr", "image-ssim", "read"):
        assert bad[name] < better[name], name
    for name in ("lpips", "fid", "kid", "points-lost"):
        assert bad[name] > better[name], name


def test_budgets_that_are_met_pass(twin: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Only one network, no images; as tables."""
    words = ["--component", "unet", "--images", "0", "--samples", "2", "--budget", "cosine>=0.999"]
    assert main(["evaluate", str(twin[0]), *words]) == 0
    out = capsys.readouterr()
    assert "unet/fp16" in out.out and "recorded from" in out.out and "--images N draws" in out.out
    assert "text_encoder" not in out.out and "budget" not in out.err


def test_given_feeds_of_odd_batches_against_eager(twin: tuple[Path, Any], tmp_path: Path) -> None:
    """Batches of 1, 3 and 7 at a size that was not traced; eager is the reference, and fp32 is measured too."""
    for i, batch in enumerate((1, 3, 7)):
        rng = np.random.default_rng(i)
        feeds = {
            "sample": rng.standard_normal((batch, 4, 6, 10)).astype(np.float32),
            "timestep": np.full((batch,), 100.0 * i, np.float32),
            "encoder_hidden_states": rng.standard_normal((batch, 16, 64)).astype(np.float32),
        }
        np.savez(tmp_path / f"{i}.npz", **feeds)
    found = optimize.evaluate(twin[0], against="eager", components=["unet"], calibration=tmp_path, images=0)
    assert [a.artifact for a in found.artifacts] == ["unet/fp32", "unet/fp16"]
    for artifact in found.artifacts:
        assert artifact.against == "eager fp32" and artifact.outputs[0].samples == 3
        assert 100 < artifact.outputs[0].figures["snr"] < 160
        assert list(artifact.outputs[0].by_timestep) == ["200", "100", "0"]


def test_without_its_source_a_bundle_is_measured_on_random_feeds(twin: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(twin[0], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "source": str(tmp_path / "gone")}))
    found = optimize.evaluate(folder, components=["unet"], samples=2)
    assert "synthetic" in found.artifacts[0].data and of_unet(found).figures["ssim"] == 1
    assert found.images[0].skipped and not found.images[0].figures


def test_a_file_that_is_not_the_proved_one_is_not_measured(twin: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(twin[0], folder)
    disturb(folder / "unet" / "unet.fp16.safetensors", 0.1)
    with pytest.raises(GateError, match="not the file that was proved"):
        optimize.evaluate(folder, components=["unet"], samples=1, images=0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"against": "int9"}, "unknown against int9"),
        ({"against": "fp16", "components": ["vae_decoder"]}, "no ONNX artifact in fp16"),
        ({"components": ["vae_decoder"]}, "nothing to measure against fp32"),
        ({"components": ["no"]}, "the bundle has no component no"),
        ({"precisions": ["bf16"]}, "unknown precision bf16"),
        ({"samples": 0}, "--samples is too small"),
        ({"images": -1}, "--images is too small"),
        ({"seed": -1}, "--seed does not fit"),
        ({"budgets": ["fid>=1"]}, "--budget asks for something"),
        ({"budgets": ["good"]}, "--budget was not understood"),
        ({"features": "nothing:there", "samples": 1, "images": 1, "components": ["unet"]}, "--features names nothing"),
    ],
)
def test_wrong_words(twin: tuple[Path, Any], words: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        optimize.evaluate(twin[0], **words)


def test_without_torchmetrics_it_says_how_to_get_it(twin: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from optimize import evaluating

    monkeypatch.setattr(evaluating, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"need torchmetrics[\s\S]*optimize\[quality\]"):
        optimize.evaluate(twin[0])


# --- what the figures are made of ------------------------------------------------------------------------------------


def test_means_leave_out_what_is_infinitely_good() -> None:
    assert mean([math.inf, 10, 20]) == 15 and mean([math.inf] * 2) == math.inf and math.isnan(mean([math.nan, 1.0]))
    assert worst([3.0, -math.inf, 5.0]) == -math.inf and math.isnan(worst([-math.inf, math.nan, 1.0]))


def test_many_timesteps_share_rows() -> None:
    times = [float(t) for t in range(77)] + [None]
    rows = by_timestep([{"snr": float(t or 0)} for t in times], times)
    assert len(rows) == 10 and next(iter(rows)) == "69-76" and rows["69-76"]["snr"] == pytest.approx(72.5)
    assert list(rows)[-1] == "0-4" and by_timestep([{"snr": 1.0}], [3.0]) == {}
    assert list(by_timestep([{"snr": 1.0}] * 2, [0.5, 1.0])) == ["1", "0.5"]


def test_timesteps_of_feeds() -> None:
    assert timestep_of({"timestep": torch.tensor([7, 7, 7])}) == 7
    assert timestep_of({"timestep": torch.tensor([7, 8])}) is None and timestep_of({"x": torch.ones(1)}) is None


def test_only_pictures_have_ssim() -> None:
    keys = torch.randn(1, 2, 7, 63)
    assert "ssim" not in figures_of(keys, keys, "lm") and "ssim" in figures_of(keys, keys, "vae_decoder")
    assert "ssim" not in figures_of(keys[..., :2], keys[..., :2], "unet")
    assert "ssim" not in figures_of(keys[:0], keys[:0], "unet") and "ssim" not in figures_of(keys[0], keys[0], "dit")
    found = quality_of("y", [{"snr": 1.0, "ssim": 0.5}, {"snr": 3.0}], [None, None])
    assert (found.figures, found.worst, found.by_timestep) == ({"snr": 2.0}, {"snr": 1.0}, {})
