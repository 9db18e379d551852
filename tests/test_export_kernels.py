"""`optimize export --kernels` through the real command: proved by the bodies and by the native library, and counted."""

import json
from pathlib import Path

import pytest

from optimize.compile import runners
from optimize.compile.bundle import Bundle
from optimize.compile.runners import OnnxRuntimeRunner, uses_kernels
from optimize.errors import InputError, MissingError
from optimize.exporting import export
from optimize.kernels import native_library
from optimize.tools import cli


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels") / "flux"
    words = ["export", "arch:flux-dev@tiny", "--out", str(folder), "--component", "transformer", "--kernels"]
    assert cli.main(words) == 0
    return folder


def test_flux_passes_with_and_without_the_native_library(bundle: Path) -> None:
    (artifact,) = Bundle.read(bundle).artifacts(kind="onnx")
    assert artifact.id == "transformer/fp32/kernels"
    assert artifact.parity is not None and artifact.parity.passed
    assert artifact.parity.worst < 1e-5
    (note,) = artifact.parity.notes
    assert note.startswith("by the functions' bodies; with the native library too: ")
    assert float(note.rpartition(" ")[2]) < 1e-5


def test_inspect_counts_nodes_of_each_kind(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its 2 double and 3 single blocks: an attention and a rotation each, two of them over text and image."""
    assert cli.main(["inspect", str(bundle), "--fusions", "--json"]) == 0
    (graph,) = json.loads(capsys.readouterr().out)["graphs"]
    found = [site["into"] for site in graph["sites"]]
    counts = {name: found.count(f"ai.optimize::{name}") for name in ("Attention", "QKNormRope", "LayerNormModulated")}
    assert counts == {"Attention": 5, "QKNormRope": 7, "LayerNormModulated": 8}
    assert found.count("ai.optimize::GatedAddLayerNormModulated") == 4
    assert cli.main(["inspect", str(bundle), "--fusions"]) == 0
    assert "5 Attention" in capsys.readouterr().out


def test_verify_measures_it_again(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(bundle)]) == 0
    assert "transformer/fp32/kernels" in capsys.readouterr().out


def test_the_standard_graph_stands_beside_it_and_shares_no_node_of_ours(bundle: Path) -> None:
    export("arch:flux-dev@tiny", bundle, components=["transformer"])
    artifacts = {a.id: a for a in Bundle.read(bundle).artifacts(kind="onnx")}
    assert set(artifacts) == {"transformer/fp32", "transformer/fp32/kernels"}
    assert not uses_kernels(bundle / artifacts["transformer/fp32"].path)
    assert uses_kernels(bundle / artifacts["transformer/fp32/kernels"].path)


def test_convolutions_around_our_norms_in_fp16(tmp_path: Path) -> None:
    """ONNX Runtime's layout pass makes sizes without a name between them, which our operators once passed on as -1."""
    made = export(
        "arch:vae-flux@tiny", tmp_path / "vae", precisions=["fp16"], components=["vae_flux_encoder"], kernels=True
    )
    (artifact,) = made.artifacts(kind="onnx")
    assert artifact.parity is not None and "native library too" in artifact.parity.notes[0]


def test_below_opset_23_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bodies from opset 23 on"):
        export("arch:clip-l@tiny", tmp_path / "d", opset=22, kernels=True)


def test_without_the_library_only_who_insists_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Path:
        raise MissingError("the native library was not built")

    monkeypatch.setattr(native_library, "ort_library", absent)
    path = next(a for a in Bundle.read(bundle).artifacts(kind="onnx") if a.id.endswith("kernels")).path
    with OnnxRuntimeRunner(bundle / path) as runner:
        assert runner.name == "onnxruntime"
    with pytest.raises(MissingError, match="not built"), OnnxRuntimeRunner(bundle / path, native=True):
        pass


def test_a_library_without_gpu_kernels_stays_out_of_a_cuda_session() -> None:
    assert native_library.cubins(native_library.ort_library()) == 0  # what the package's own build carries
    assert runners.native_library("CUDAExecutionProvider") is None
    with pytest.raises(MissingError, match="built without GPU kernels"):
        runners.native_library("CUDAExecutionProvider", required=True)
    assert runners.native_library() == native_library.ort_library()
