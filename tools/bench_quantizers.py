"""What `bench_quantize` has done in a process of its own: the base, our schemes, and the quantizers of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from optimize import quantize
from optimize.compile import external
from optimize.compile.bundle import Bundle
from optimize.compile.records import Artifact
from optimize.compile.runners import loaded_module
from optimize.exporting import export
from optimize.loading import component_of, source_of
from optimize.quantize.data import feeds_of
from optimize.quantize.place import Placement, placed
from optimize.quantize.schemes import SCHEMES
from optimize.quantize.sets import read_set
from optimize.quantize.texts import HELD
from optimize.quantizing import HELD_OUT
from optimize.tools.bench_workers import Job, Reader


def artifact_of(bundle: Bundle, precision: str) -> Artifact:
    return next(a for a in bundle.artifacts(kind="onnx") if a.spec["precision"] == precision)


def base(job: Job) -> dict[str, Any]:
    """The fp32 export, proved, with the data that all sides calibrate on and those that they are measured on. They lie
    where `optimize.quantize` looks for its own, so that its time is without making them."""
    components = [job.words["component"]] if job.words["component"] else []
    bundle = export(job.model, job.out / "bundle", components=components, axes=job.words["axes"])
    artifact = artifact_of(bundle, "fp32")
    component, samples = component_of(bundle, artifact.component), int(job.words["samples"])
    source = source_of(bundle, (component.name,))
    folders = {}
    for kind, count, seed in (("samples", samples, 0), ("held-out", min(HELD_OUT, max(2, samples // 4)), HELD)):
        folders[kind] = bundle.root / "calibration" / f"{component.name}.{kind}"
        found = feeds_of(component, source, folders[kind], samples=count, seed=seed)
    parity = artifact.parity
    assert parity is not None
    return {
        "graph": f"bundle/{artifact.path}",
        "bytes": artifact.bytes + sum(bundle.manifest.artifacts[p].bytes for p in artifact.parents),
        "component": component.name,
        "samples": str(folders["samples"]),
        "held_out": str(folders["held-out"]),
        "data": found.how,
        "parity": {"passed": parity.passed, "relative": parity.worst, "rule": parity.rule},
        "group_norms": sum(n.op_type == "GroupNormalization" for n in ir.load(bundle.path(artifact)).graph),
    }


def quantized(job: Job) -> dict[str, Any]:
    """`optimize.quantize` as users have it, its proof, its figures and its latencies included."""
    words = job.words
    root = Path(job.words["bundle"])
    quantize(root, scheme=words["scheme"], samples=words["samples"], budgets=words["budgets"])
    artifact = artifact_of(Bundle.read(root), words["scheme"])
    receipt = artifact.receipt
    assert receipt is not None
    return {
        "graph": str(root / artifact.path),
        "steps_s": dict(artifact.seconds),
        "receipt": {
            "headline": receipt.headline,
            "found": receipt.found,
            "chosen": receipt.chosen,
            "kernels": receipt.kernels,
            "budget": receipt.budget,
        },
    }


def instance_norms(job: Job) -> dict[str, Any]:
    """Our fp32 graph with the one change that our placement for ONNX Runtime makes beside Q and DQ."""
    model = placed(ir.load(job.model), Placement(SCHEMES["int8"], "onnxruntime", "mse", ()))
    weights = job.out / "model.safetensors"
    external.write_weights(model, weights, {}, lambda *_: None)
    external.inline_small(model)
    external.point_at(model, weights.name, external.header_bytes(weights))
    ir.save(model, job.out / "model.onnx")
    return {"graph": "model.onnx"}


def dynamo(job: Job) -> dict[str, Any]:
    """`torch.onnx.export(dynamo=True)` of the same module in fp32, at the sizes of a sample."""
    bundle = Bundle.read(Path(job.words["bundle"]))
    component = component_of(bundle, job.words["component"])
    feeds = next(iter(read_set(Path(job.samples))))
    torch.onnx.export(
        loaded_module(component, "fp32").eval(),
        tuple(feeds[t.name] for t in component.inputs),
        str(job.out / "model.onnx"),
        input_names=[t.name for t in component.inputs],
        output_names=list(component.outputs),
        dynamo=True,
        verbose=False,
    )
    return {"graph": "model.onnx"}


def ort_static(job: Job) -> dict[str, Any]:
    """ONNX Runtime's static quantizer with its defaults (Q and DQ, int8, min-max)."""
    from onnxruntime.quantization import quantize_static

    out = job.out / "model.onnx"
    quantize_static(job.model, str(out), Reader(job.samples), use_external_data_format=bool(job.words["large"]))
    return {"graph": out.name}


def ort_dynamic(job: Job) -> dict[str, Any]:
    """ONNX Runtime's dynamic quantizer with its defaults."""
    from onnxruntime.quantization import quantize_dynamic

    out = job.out / "model.onnx"
    quantize_dynamic(job.model, str(out), use_external_data_format=bool(job.words["large"]))
    return {"graph": out.name}
