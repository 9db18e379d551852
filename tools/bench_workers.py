"""One process of `bench_export` or `bench_quantize`: one export, one quantization, one judgement, and what it cost.

A process of its own makes its peak memory honest. The job comes as JSON on stdin and the result goes as JSON into the
job's folder. Only the standard library is imported here, and `optimize` only by the jobs that need it, because the
same file runs in the environment of optimum-onnx, which has none.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SAMPLE_S = 0.02
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "optimum",
    "optimum-onnx",
    "nvidia-modelopt",
)


class Job(NamedTuple):
    """What to do. `inputs` are name -> {shape, dtype, axes: {dimension: [axis, factor]}} at the traced sizes."""

    side: str
    folder: str
    model: str = ""
    precision: str = "fp32"
    class_name: str = ""
    config: Mapping[str, Any] = {}
    inputs: Mapping[str, Mapping[str, Any]] = {}
    outputs: Mapping[str, Mapping[str, Any]] = {}
    sizes: Mapping[str, Mapping[str, int]] = {}
    graphs: Mapping[str, str] = {}
    order: tuple[str, ...] = ()
    runs: int = 3
    memory: int | None = None
    samples: str = ""
    words: Mapping[str, Any] = {}

    @property
    def out(self) -> Path:
        return Path(self.folder)


class Side(NamedTuple):
    """One exporter in three parts: what it imports, the model that it wants loaded, and the export itself."""

    imports: tuple[str, ...]
    load: Callable[[Job], Any]
    export: Callable[[Job, Any], dict[str, Any]]


# --- memory ----------------------------------------------------------------------------------------------------------


def memory_bytes() -> dict[str, int]:
    """This process's memory now (Linux), in bytes: VmHWM, VmRSS and its parts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon", "RssFile")))
    return {name: int(text.split()[0]) * 1024 for name, text in found.items()}


class Watch:
    """Peaks of memory while the body runs. VmHWM is the kernel's own mark, set back at the start; RssAnon has no mark
    of its own and is sampled every 20 ms: pages of mapped files, which the kernel can drop, are not in it."""

    def __init__(self) -> None:
        self.peak_rss = self.peak_anon = self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.peak_anon = max(self.peak_anon, memory_bytes()["RssAnon"])
            self.samples += 1

    def __enter__(self) -> Watch:
        Path("/proc/self/clear_refs").write_text("5")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        end = memory_bytes()
        self.peak_rss, self.peak_anon = end["VmHWM"], max(self.peak_anon, end["RssAnon"])


# --- the exports -----------------------------------------------------------------------------------------------------


def export_with(name: str, module: str = "optimize.tools.bench_ours") -> Callable[[Job, Any], dict[str, Any]]:
    """What is done by a module of the package, which the environments of others have not."""
    return lambda job, _: dict(getattr(importlib.import_module(module), name)(job))


def loaded_unet(job: Job) -> Any:
    """The model in memory. diffusers maps its file, so each weight is read once here: otherwise the first use, inside
    the export, would look like the export's own memory."""
    import torch
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(job.model, torch_dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.detach().sum()
    return model


def tensors_of(job: Job) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(spec["shape"], generator=generator).to(getattr(torch, spec["dtype"]))
        for name, spec in job.inputs.items()
    }


def export_dynamo(job: Job, model: Any, opset: int | None = None) -> dict[str, Any]:
    """`torch.onnx.export(dynamo=True)` with its defaults, and an opset where one is asked for."""
    import torch

    dims: dict[str, Any] = {}
    shapes: dict[str, Any] = {"return_dict": None}
    for name, spec in job.inputs.items():
        shapes[name] = {}
        for dim, (axis, factor) in spec["axes"].items():
            dims.setdefault(axis, torch.export.Dim(axis, min=1))
            shapes[name][int(dim)] = dims[axis] if factor == 1 else factor * dims[axis]
    tensors = tensors_of(job)
    with torch.no_grad():
        torch.onnx.export(
            model,
            tuple(tensors.values()),
            str(job.out / "model.onnx"),
            kwargs={"return_dict": False},
            input_names=list(tensors),
            output_names=list(job.outputs),
            dynamic_shapes=shapes,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    return {"graph": "model.onnx"}


def export_torchscript(job: Job, model: Any) -> dict[str, Any]:
    import torch

    tensors = tensors_of(job)
    axes = {
        name: {int(dim): axis for dim, (axis, _) in spec["axes"].items()}
        for name, spec in (*job.inputs.items(), *job.outputs.items())
    }
    with torch.no_grad():
        torch.onnx.export(
            model,
            tuple(tensors.values()),
            str(job.out / "model.onnx"),
            kwargs={"return_dict": False},
            input_names=list(tensors),
            output_names=list(job.outputs),
            dynamic_axes=axes,
            dynamo=False,
        )
    return {"graph": "model.onnx"}


def export_optimum(job: Job, model: Any) -> dict[str, Any]:
    """optimum's own config and export function; only the sizes to trace at and the timestep's batch axis are ours.

    Its "fix" of dynamic axes, which opens an ONNX Runtime session, is left out: that is in its favour.
    """
    from optimum.exporters.onnx import export
    from optimum.exporters.onnx.model_configs import UNetOnnxConfig

    class SameAxes(UNetOnnxConfig):  # type: ignore[misc]  # optimum-onnx is not in the environment that is checked
        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {**super().inputs, "timestep": {0: "batch_size"}}

        def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> dict[str, Any]:
            return tensors_of(job)

    config = SameAxes(model.config, task="semantic-segmentation")
    export(model=model, config=config, output=job.out / "model.onnx", disable_dynamic_axes_fix=True)
    return {"graph": "model.onnx"}


class Reader:
    """The samples of a calibration set as ONNX Runtime's quantizer and Model-Optimizer's want them."""

    def __init__(self, folder: str) -> None:
        self.files = sorted(Path(folder).glob("*.safetensors"))
        self.rewind()

    def rewind(self) -> None:
        self.left = iter(self.files)

    def get_next(self) -> dict[str, Any] | None:
        from safetensors.numpy import load_file

        file = next(self.left, None)
        return None if file is None else dict(load_file(file))

    def get_first(self) -> dict[str, Any] | None:
        self.rewind()
        first = self.get_next()
        self.rewind()
        return first


def quantize_modelopt(job: Job, _: Any) -> dict[str, Any]:
    """Model-Optimizer's ONNX path with its defaults; what stays high is fp32, because a CPU runs it. It writes beside
    the graph, which therefore is a copy."""
    from modelopt.onnx.quantization import quantize  # type: ignore[import-not-found]  # in an environment of its own

    base = Path(job.model)
    copy = Path(shutil.copytree(base.parent, job.out / "base")) / base.name
    quantize(
        str(copy),
        quantize_mode="int8",
        calibration_data_reader=Reader(job.samples),
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        use_external_data_format=bool(job.words["large"]),
        output_path=str(job.out / "model.onnx"),
    )
    shutil.rmtree(copy.parent)
    return {"graph": "model.onnx"}


UNET = "diffusers.models.unets.unet_2d_condition"
QUANTIZERS = "optimize.tools.bench_quantizers"
OURS = (
    "optimize.tools.bench_ours",
    "torch",
    "torch._dynamo",
    UNET,
    "onnx",
    "onnx_ir",
    "optimize.exporting",
    "optimize.compile.onnx_model",
    "optimize.compile.sources",
    "optimize.compile.emitters",
    "optimize.compile.leaves",
)
GATE = (
    "onnxruntime",
    "optimize.gate",
    "optimize.compile.runners",
    "optimize.profiles.parity",
    "optimize.compile.segments",
)
OPTIMUM_CONFIGS = "optimum.exporters.onnx.model_configs"
PEERS = ("torch", UNET, "onnx")
DYNAMO = (
    *PEERS,
    "torch._dynamo",
    "onnxscript",
    "torch.onnx._internal.exporter._core",
    "torch.onnx._internal.exporter._onnx_program",
)
SIDES: Mapping[str, Side] = {
    "ours": Side(OURS, lambda _: None, export_with("export_ours")),
    "ours-gated": Side((*OURS, *GATE), lambda _: None, export_with("export_gated")),
    "dynamo": Side(DYNAMO, loaded_unet, export_dynamo),
    "dynamo-opset23": Side(DYNAMO, loaded_unet, lambda job, model: export_dynamo(job, model, 23)),
    "torchscript": Side((*PEERS, "torch.onnx"), loaded_unet, export_torchscript),
    "optimum": Side((*PEERS, "optimum.exporters.onnx", OPTIMUM_CONFIGS), loaded_unet, export_optimum),
    "quantize-modelopt": Side(("onnx", "onnxruntime", "modelopt.onnx.quantization"), lambda _: None, quantize_modelopt),
    **{
        name: Side(("torch", "onnx", "onnxruntime", QUANTIZERS), lambda _: None, export_with(job, QUANTIZERS))
        for name, job in (
            ("quantize-base", "base"),
            ("quantize-ours", "quantized"),
            ("quantize-instance-norms", "instance_norms"),
            ("quantize-dynamo", "dynamo"),
            ("quantize-ort-static", "ort_static"),
            ("quantize-ort-dynamic", "ort_dynamic"),
        )
    },
}


# --- main ----------------------------------------------------------------------------------------------------------


def measured(job: Job) -> dict[str, Any]:
    """Imports, loads, then exports under the watch; wall time is the export's alone."""
    side = SIDES[job.side]
    for name in side.imports:
        importlib.import_module(name)
    imports = memory_bytes()
    start = time.perf_counter()
    model = side.load(job)
    load_s = time.perf_counter() - start
    loaded = memory_bytes()
    with Watch() as watch:
        start, cpu = time.perf_counter(), time.process_time()
        result = side.export(job, model)
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    memory = {
        "imports_rss": imports["VmRSS"],
        "loaded_rss": loaded["VmRSS"],
        "peak_rss": watch.peak_rss,
        "imports_anon": imports["RssAnon"],
        "loaded_anon": loaded["RssAnon"],
        "peak_anon_sampled": watch.peak_anon,
        "samples": watch.samples,
    }
    return {
        **result,
        "graph": str(job.out / result["graph"]),
        "load_s": load_s,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "memory_bytes": memory,
    }


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    job = Job(**json.load(sys.stdin))
    if job.side in SIDES:
        result = measured(job)
    else:
        from optimize.tools import bench_judge, bench_pairs

        result = {**bench_judge.JOBS, **bench_pairs.JOBS}[job.side](job)
    (job.out / "result.json").write_text(json.dumps({**result, "versions": versions()}))


if __name__ == "__main__":
    main()
