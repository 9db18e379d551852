"""Our two exports as `bench_export` runs them: the export alone, and the whole command."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from optimize.compile import external, onnx_model
from optimize.exporting import components_for, export, request_from_words
from optimize.tools.bench_workers import Job


def export_ours(job: Job) -> dict[str, Any]:
    """Source folder to files on disk, without check and parity."""
    (component,) = components_for(request_from_words(job.model, job.out))
    clock = onnx_model.Clock(lambda _: None)
    model, _traced, _rules = onnx_model.graph_from_component(component, job.precision, onnx_model.DEFAULT_OPSET, clock)
    onnx_model.drop_unused_initializers(model)
    weights = job.out / "model.safetensors"
    with clock("write weights"):
        external.write_weights(model, weights, {}, lambda _done, _all: None)
    with clock("write graph"):
        external.inline_small(model)
        external.point_at(model, weights.name, external.header_bytes(weights))
        ir.save(model, job.out / "model.onnx")
        ir.save(external.stripped(model), job.out / "model.view.onnx")
    return {"graph": "model.onnx", "steps_s": clock.seconds}


def export_gated(job: Job) -> dict[str, Any]:
    """`optimize.export` as users have it: digests, check, parity and manifest included."""
    bundle = export(job.model, job.out / "bundle", precisions=[job.precision], memory=job.memory)
    (artifact,) = bundle.artifacts(kind="onnx")
    assert artifact.parity is not None
    worst = max(artifact.parity.shapes, key=lambda s: max(o.relative for o in s.outputs))
    parity = {
        "passed": artifact.parity.passed,
        "relative": artifact.parity.worst,
        "rule": artifact.parity.rule,
        "eager": max((o.eager for o in worst.outputs if o.eager is not None), default=None),
        "how": artifact.parity.how,
        "backend": artifact.parity.backend,
        "sizes": worst.sizes,
        "by": "our gate",
    }
    return {"graph": f"bundle/{artifact.path}", "steps_s": dict(artifact.seconds), "parity": parity}
