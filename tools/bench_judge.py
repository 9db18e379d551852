"""The jobs of `bench_export` that are no export: the model's folder, eager's answer, the judgement of the graphs."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import load_file, save_file

from optimize.compile.feeds import feeds_for
from optimize.compile.runners import EagerRunner, OnnxRuntimeRunner
from optimize.compile.sources import components_of_network, full_config, make_module, source_from_text
from optimize.compile.spec import Component, dim_terms
from optimize.compile.trace import cast
from optimize.compile.weights import RandomWeights
from optimize.profiles import parity
from optimize.tools.bench_workers import Job

THREADS = (1, 2)
SHARD_BYTES = 1 << 30


def prepare(job: Job) -> dict[str, Any]:
    """Writes the model's folder once, with random weights, and says what the exporters need to know of it."""
    folder = Path(job.model)
    if not (folder / "config.json").exists():
        config = full_config("diffusers", job.class_name, job.config)
        make = partial(make_module, "diffusers", job.class_name, job.config)
        (component,) = components_of_network(folder.name, job.class_name, config, make, RandomWeights())
        write_folder(component, job.precision, config, folder)
    component = component_of(job)
    sizes = component.shape_sets()
    inputs = {
        t.name: {
            "shape": t.sizes(sizes["traced"]),
            "dtype": t.torch_dtype(job.precision),
            "axes": axes_of(component, t.shape),
        }
        for t in component.inputs
    }
    sample = component.inputs[0]  # the output of a denoiser varies as its first input does
    outputs = {name: {"axes": axes_of(component, sample.shape)} for name in component.outputs}
    return {
        "inputs": inputs,
        "outputs": outputs,
        "sizes": sizes,
        "parameters": sum(p.numel() for p in component.build().parameters()),
        "weights_bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
    }


def write_folder(component: Component, precision: str, config: Mapping[str, Any], folder: Path) -> None:
    """The folder that `save_pretrained` would write, in shards, without the model ever being in memory."""
    module = cast(component.build(), precision)
    weights, slots = component.weights.bind(module), list(module.state_dict(keep_vars=True).items())
    shards: list[list[tuple[str, torch.Tensor]]] = [[]]
    for name, slot in slots:
        if sum(t.nbytes for _, t in shards[-1]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, slot))
    folder.mkdir(parents=True, exist_ok=True)
    stem, where = "diffusion_pytorch_model", dict[str, str]()
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        save_file({n: weights.tensor(n).to(slot.dtype) for n, slot in shard}, folder / file, {"format": "pt"})
        where |= {n: file for n, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for _, t in slots)}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": component.class_name}, default=str))


def axes_of(component: Component, shape: tuple[int | str, ...]) -> dict[int, tuple[str, int]]:
    """Dimension -> (axis, what its size is a multiple of), for those that vary."""
    found = {}
    for i, dim in enumerate(shape):
        if isinstance(dim, str) and len(dim_terms(dim)) == 1:
            ((name, divisor),) = dim_terms(dim)
            found[i] = (name, component.axes[name].step // divisor)
    return found


def component_of(job: Job) -> Component:
    (component,) = source_from_text(job.model).components
    return component


def reference(job: Job) -> dict[str, Any]:
    """Feeds at each set of `sizes`, and eager fp32's outputs at the one that was not traced."""
    component = component_of(job)
    saved: dict[str, torch.Tensor] = {}
    for name, sizes in job.sizes.items():
        saved |= {f"{name}.feed.{k}": t for k, t in feeds_for(component.inputs, sizes, "fp32").items()}
    with EagerRunner(component, "fp32") as eager:
        saved |= {f"untraced.exact.{k}": t.contiguous() for k, t in eager.infer(part(saved, "untraced.feed.")).items()}
    path = job.out / "reference.safetensors"
    save_file(saved, path)
    return {"reference": str(path)}


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def judge(job: Job) -> dict[str, Any]:
    """What each graph is; of those in `order` parity at sizes not traced, and of those that passed the latency.

    Sides take turns in `order`. One session is alive at a time, its threads do not spin, and the process is pinned to
    as many cores as the session has threads.
    """
    result: dict[str, Any] = {side: facts_of_graph(Path(path)) for side, path in job.graphs.items()}
    if not job.order:
        return {"sides": result}
    saved = load_file(job.model)
    for side in job.order:
        result[side] |= {"parity": parity_of_graph(job, side, saved), "latency_ms": {}, "latency_cpu_ms": {}}
    passed = [side for side in job.order if result[side]["parity"]["passed"]]
    cores = sorted(os.sched_getaffinity(0))
    for threads in THREADS:
        os.sched_setaffinity(0, cores[:threads])
        for side in passed:
            wall, cpu = latencies_ms(Path(job.graphs[side]), part(saved, "latency.feed."), threads, job.runs)
            result[side]["latency_ms"][str(threads)] = statistics.median(wall)
            result[side]["latency_cpu_ms"][str(threads)] = statistics.median(cpu)
    return {"sides": result}


def parity_of_graph(job: Job, side: str, saved: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "passed": False,
        "sizes": dict(job.sizes["untraced"]),
        "rule": parity.rule_of("fp32"),
        "by": "judge",
        "backend": "onnxruntime CPU",
    }
    exact = part(saved, "untraced.exact.")
    try:
        with OnnxRuntimeRunner(Path(job.graphs[side])) as runner:
            got = runner.infer(part(saved, "untraced.feed."))
    except Exception as e:  # ONNX Runtime raises many kinds; each means that this graph does not run at these sizes
        return {**found, "error": f"{type(e).__name__}: {str(e)[:300]}"}
    relative, worst = parity.distance([got[n] for n in exact], list(exact.values()))
    return {**found, "passed": relative <= parity.FP32_LIMIT, "relative": relative, "worst": worst}


def latencies_ms(
    path: Path, feeds: Mapping[str, torch.Tensor], threads: int, runs: int
) -> tuple[list[float], list[float]]:
    """(wall, processor time of all threads) of each run after one that is not counted."""
    wall, cpu = [], []
    with OnnxRuntimeRunner(path, threads=threads) as runner:
        runner.infer(feeds)
        for _ in range(runs):
            start, spent = time.perf_counter(), time.process_time()
            runner.infer(feeds)
            cpu.append(1e3 * (time.process_time() - spent))
            wall.append(1e3 * (time.perf_counter() - start))
    return wall, cpu


# --- what an export gave ---------------------------------------------------------------------------------------------


def count(nodes: Iterable[Any]) -> dict[str, int]:
    """Nodes by operator, those of subgraphs included."""
    found: dict[str, int] = {}
    for node in nodes:
        found[node.op_type] = found.get(node.op_type, 0) + 1
        for attribute in node.attribute:
            for kind, n in count(attribute.g.node).items():
                found[kind] = found.get(kind, 0) + n
    return found


def external_files(model: onnx.ModelProto) -> set[str]:
    return {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}


def bytes_of_graph(path: Path, files: Iterable[str]) -> int:
    """Of the graph and the files that its weights lie in, which are beside it."""
    return path.stat().st_size + sum((path.parent / f).stat().st_size for f in files)


def facts_of_graph(path: Path) -> dict[str, Any]:
    """Nodes, opset, bytes on disk, and a digest of nodes and weights: equal digests mean the same network.

    `Constant` nodes are counted apart: others keep the same numbers as initializers.
    """
    model = onnx.load(str(path), load_external_data=False)
    kinds = count([*model.graph.node, *(n for f in model.functions for n in f.node)])
    digest = hashlib.sha256()
    for node in model.graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    files = external_files(model)
    for tensor in model.graph.initializer:
        digest.update(f"{tensor.name}{tensor.data_type}{list(tensor.dims)}".encode() + tensor.raw_data)
    for name in sorted(f for f in files if f.endswith(".safetensors")):
        with (path.parent / name).open("rb") as file:
            file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
            while block := file.read(1 << 22):
                digest.update(block)
    constants = kinds.get("Constant", 0)
    return {
        "nodes": sum(kinds.values()),
        "constant_nodes": constants,
        "opset": model.opset_import[0].version,
        "file_bytes": bytes_of_graph(path, files),
        "files": 1 + len(files),
        "digest": digest.hexdigest(),
    }


JOBS: Mapping[str, Callable[[Job], dict[str, Any]]] = {"prepare": prepare, "reference": reference, "judge": judge}
