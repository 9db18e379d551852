"""The native library's CPU kernels beside ONNX Runtime: the standard operators of each body, and its own fused ones.

    python tools/bench_native.py --out profiles/records/native-cpu.json
    python tools/bench_native.py --only self --rounds 3

Each side is compared with float64 before it is timed. Sessions take turns, in random order, each pinned to as many
cores as it has threads, none spinning. Figures are medians over the rounds, with the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimize.errors import GateError, InputError, MissingError, OptimizeError
from optimize.kernels import functions, ort_library, reference
from optimize.tools import bench_machine

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
ALLOWED = 1e-5
"""Relative error in fp32, against float64, that a side may have and still be timed."""
EPSILON = float(np.float32(1e-5))
LEAST_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Node:
    """One node to time: an operator on inputs (names of the case's tensors), with the layout of its result."""

    domain: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    outputs: int = 1
    heads: int = 0  # of [batch, tokens, heads * head_dim]; 0: as ours


@dataclass(frozen=True)
class Case:
    """An operation at a real size. `truth` computes its first result from the tensors, in their precision."""

    name: str
    where: str  # the model and the layer
    tensors: Callable[[], dict[str, Tensor]]
    truth: Callable[..., Tensor]
    ours: Node
    fused: Node | None = None  # ONNX Runtime's own; None where its CPU provider has none


# --- cases -----------------------------------------------------------------------------------------------------------


def attention(name: str, where: str, heads: int, queries: int, keys: int, head_dim: int) -> Case:
    scale = float(np.float32(head_dim**-0.5))

    def tensors() -> dict[str, Tensor]:
        q, k, v = (torch.randn(1, heads, n, head_dim) for n in (queries, keys, keys))
        flat = {f"{n}_flat": x.transpose(1, 2).flatten(2).contiguous() for n, x in (("q", q), ("k", k), ("v", v))}
        return {"q": q, "k": k, "v": v, **flat}

    return Case(
        name,
        where,
        tensors,
        lambda q, k, v, **_: reference.attention(q, k, v, None, False, scale),
        Node("ai.optimize", "Attention", ("q", "k", "v"), {"causal": 0, "scale": scale}),
        Node(
            "com.microsoft",
            "MultiHeadAttention",
            ("q_flat", "k_flat", "v_flat"),
            {"num_heads": heads, "scale": scale},
            heads=heads,
        ),
    )


def add_norm(name: str, where: str, tokens: int, channels: int) -> Case:
    def tensors() -> dict[str, Tensor]:
        x, residual = torch.randn(2, 1, tokens, channels)
        return {"x": x, "residual": residual, "weight": torch.randn(channels), "bias": torch.randn(channels)}

    return Case(
        name,
        where,
        tensors,
        lambda x, residual, weight, bias: reference.layer_norm(x + residual, weight, bias, EPSILON, None, None),
        Node("ai.optimize", "AddLayerNorm", ("x", "residual", "weight", "bias"), {"epsilon": 1e-5}, 2),
        Node("com.microsoft", "SkipLayerNormalization", ("x", "residual", "weight", "bias"), {"epsilon": 1e-5}),
    )


def modulated(name: str, where: str, tokens: int, channels: int) -> Case:
    def tensors() -> dict[str, Tensor]:
        scale, shift = torch.randn(2, 1, 1, channels)
        weight, bias = torch.ones(channels), torch.zeros(channels)
        return {"x": torch.randn(1, tokens, channels), "weight": weight, "bias": bias, "scale": scale, "shift": shift}

    return Case(
        name,
        where,
        tensors,
        lambda x, weight, bias, scale, shift: reference.layer_norm(x, weight, bias, EPSILON, scale, shift),
        Node("ai.optimize", "LayerNormModulated", ("x", "weight", "bias", "scale", "shift"), {"epsilon": 1e-5}),
    )


def group_norm(name: str, where: str, channels: int, side: int) -> Case:
    def tensors() -> dict[str, Tensor]:
        x = torch.randn(1, channels, side, side)
        return {"x": x, "weight": torch.randn(channels), "bias": torch.randn(channels)}

    return Case(
        name,
        where,
        tensors,
        lambda x, weight, bias: reference.group_norm(x, 32, weight, bias, EPSILON, "silu"),
        Node("ai.optimize", "GroupNormSiLU", ("x", "weight", "bias"), {"groups": 32, "epsilon": 1e-5}),
    )


def rope(name: str, where: str, heads: int, tokens: int, head_dim: int) -> Case:
    def tensors() -> dict[str, Tensor]:
        q, k = torch.randn(2, 1, heads, tokens, head_dim)
        angle = torch.rand(1, tokens, head_dim // 2) * 6
        weights = {n: torch.randn(head_dim) for n in ("q_weight", "k_weight")}
        return {"q": q, "k": k, **weights, "cos": angle.cos(), "sin": angle.sin()}

    return Case(
        name,
        where,
        tensors,
        lambda **t: reference.qk_norm_rope(**t, eps=EPSILON, interleaved=True)[0],
        Node(
            "ai.optimize",
            "QKNormRope",
            ("q", "k", "q_weight", "k_weight", "cos", "sin"),
            {"epsilon": 1e-5, "interleaved": 1},
            2,
        ),
    )


def gated(name: str, where: str, op: str, tokens: int, channels: int) -> Case:
    activation = {"GeGLU": "gelu", "SwiGLU": "silu"}[op]

    def tensors() -> dict[str, Tensor]:
        value, gate = torch.randn(2, 1, tokens, channels)
        return {"value": value, "gate": gate}

    attributes = {"approximate": "none"} if op == "GeGLU" else {}
    return Case(
        name,
        where,
        tensors,
        lambda value, gate: reference.gated(value, gate, activation),
        Node("ai.optimize", op, ("value", "gate"), attributes),
    )


CASES = (
    attention("sd15-self", "SD1.5 U-Net, 512 x 512, first level", 8, 4096, 4096, 40),
    attention("sd15-cross", "SD1.5 U-Net, 512 x 512, first level", 8, 4096, 77, 40),
    attention("sd15-self-80", "SD1.5 U-Net, second level", 8, 1024, 1024, 80),
    attention("sd15-self-160", "SD1.5 U-Net, third level", 8, 256, 256, 160),
    attention("sdxl-self", "SDXL U-Net, 1024 x 1024, third level", 20, 1024, 1024, 64),
    attention("sdxl-cross", "SDXL U-Net, 1024 x 1024, third level", 20, 1024, 77, 64),
    attention("vae-mid", "VAE decoder, 256 x 256, middle block", 1, 1024, 1024, 512),
    attention("clip-text", "CLIP text encoder (without its mask)", 12, 77, 77, 64),
    attention("flux-512", "FLUX.1, 512 x 512, 3 of 24 heads", 3, 1536, 1536, 128),
    add_norm("sd15-add-norm", "SD1.5 U-Net, first level", 4096, 320),
    modulated("flux-modulated", "FLUX.1, 512 x 512", 1536, 3072),
    group_norm("sd15-group-norm", "SD1.5 U-Net, first level", 320, 64),
    group_norm("vae-group-norm", "VAE decoder, 512 x 512, last level", 128, 512),
    rope("flux-rope", "FLUX.1, 512 x 512", 24, 1536, 128),
    gated("sd15-geglu", "SD1.5 U-Net, first level", "GeGLU", 4096, 1280),
    gated("llama-swiglu", "Llama 3.2 1B, 512 tokens", "SwiGLU", 512, 8192),
)


# --- sides -----------------------------------------------------------------------------------------------------------


def model_of(node: Node, tensors: Mapping[str, Tensor]) -> bytes:
    """One node; ours carries its body, which runs where the library is not loaded."""
    import onnx
    from onnx import helper

    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(tensors[name].shape))

    results = [f"result{i}" for i in range(node.outputs)]
    graph = helper.make_graph(
        [helper.make_node(node.op, node.inputs, results, domain=node.domain, **node.attributes)],
        node.op,
        [value(name) for name in node.inputs],
        [helper.make_tensor_value_info(r, onnx.TensorProto.FLOAT, None) for r in results],
    )
    opsets = [helper.make_opsetid("", functions.LEAST_OPSET), helper.make_opsetid(node.domain, 1)]
    bodies = [functions.function(node.op)] if node.domain == functions.DOMAIN else []
    made: bytes = helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=10).SerializeToString()
    return made


class Side:
    """A session and its feeds."""

    def __init__(self, node: Node, tensors: Mapping[str, Tensor], threads: int, library: bool) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if library:
            options.register_custom_ops_library(str(ort_library()))
        self.session = ort.InferenceSession(model_of(node, tensors), options, providers=["CPUExecutionProvider"])
        self.feeds = {name: tensors[name].numpy() for name in node.inputs}
        self.node = node

    def result(self) -> Tensor:
        """The first result, in our layout."""
        y = torch.from_numpy(self.session.run(None, self.feeds)[0])
        return y.unflatten(2, (self.node.heads, -1)).transpose(1, 2) if self.node.heads else y

    def seconds(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self.session.run(None, self.feeds)
        return (time.perf_counter() - start) / calls


def sides_of(case: Case, tensors: Mapping[str, Tensor], threads: int) -> dict[str, Side]:
    sides = {
        "ours": Side(case.ours, tensors, threads, library=True),
        "body": Side(case.ours, tensors, threads, library=False),
    }
    if case.fused is not None:
        sides["fused"] = Side(case.fused, tensors, threads, library=False)
    return sides


def check(case: Case, sides: Mapping[str, Side], tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative errors; GateError where a side that is to be timed is wrong."""
    truth = case.truth(**{name: x.double() for name, x in tensors.items()})
    errors = {name: float((side.result() - truth).norm() / truth.norm()) for name, side in sides.items()}
    for name, error in errors.items():
        if not error <= ALLOWED:
            raise GateError(f"{case.name}: {name} is wrong and is not timed", got=error, expected=f"at most {ALLOWED}")
    return errors


def spread(samples: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(samples, n=10) if len(samples) > 1 else [samples[0]] * 9
    return {"median_ms": 1e3 * statistics.median(samples), "p10_ms": 1e3 * cuts[0], "p90_ms": 1e3 * cuts[8]}


def timed(case: Case, threads: int, rounds: int) -> dict[str, Any]:
    tensors = case.tensors()
    sides = sides_of(case, tensors, threads)
    errors = check(case, sides, tensors)
    calls = {name: max(1, round(LEAST_SAMPLE_S / max(side.seconds(1), 1e-6))) for name, side in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name in random.sample(sorted(sides), len(sides)):
            samples[name].append(sides[name].seconds(calls[name]))
    figures = {name: spread(s) | {"error": errors[name]} for name, s in samples.items()}
    ratios = {
        f"{name}/ours": statistics.median(a / b for a, b in zip(samples[name], samples["ours"], strict=True))
        for name in sides
        if name != "ours"
    }
    return {"threads": threads, "sides": figures, "ratios": ratios}


# --- the run ---------------------------------------------------------------------------------------------------------


def pinned(threads: int, cores: Sequence[int]) -> None:
    """The process, and the threads of the sessions that it then makes."""
    if threads > len(cores):
        raise MissingError("too few cores", got=len(cores), expected=threads, mend="ask for fewer --threads")
    os.sched_setaffinity(0, cores[:threads])


def chosen(word: str) -> list[Case]:
    found = [case for case in CASES if word in case.name]
    if not found:
        raise InputError("--only: no such case", got=word, expected=", ".join(case.name for case in CASES))
    return found


def line(case: Case, row: Mapping[str, Any]) -> str:
    figures = "  ".join(f"{n} {f['median_ms']:9.3f} ms" for n, f in row["sides"].items())
    ratios = "  ".join(f"{n} {r:.2f}" for n, r in row["ratios"].items())
    return f"{case.name:16} {row['threads']} thread(s)  {figures}  {ratios}"


def record(asked: argparse.Namespace) -> dict[str, Any]:
    import onnxruntime as ort

    torch.manual_seed(0)
    load, cores, rows = bench_machine.Load(), sorted(os.sched_getaffinity(0)), []
    for threads in asked.threads:
        pinned(threads, cores)
        for case in chosen(asked.only):
            row = timed(case, threads, asked.rounds)
            print(line(case, row), flush=True)
            rows.append({"case": case.name, "where": case.where, **row})
    os.sched_setaffinity(0, cores)
    return {
        "schema": SCHEMA,
        "device": bench_machine.device(),
        "commit": bench_machine.commit(ROOT),
        "onnxruntime": ort.__version__,
        "rounds": asked.rounds,
        "load": load.so_far(),
        "rows": rows,
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, help="write the record here")
    asked = parser.parse_args(words)
    try:
        made = record(asked)
    except OptimizeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if asked.out:
        asked.out.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
