"""Small records of profiles for the tests of what shows them. Their figures are made up; nothing here was measured."""

from __future__ import annotations

import random
from typing import Any

from optimize.profiles.schema import (
    Breakdown,
    Change,
    Choice,
    Comparison,
    Cost,
    Estimate,
    Limits,
    Load,
    Machine,
    Memory,
    OperatorTime,
    Pick,
    PipelinePart,
    PipelineTime,
    Preparation,
    Profile,
    Ratio,
    Roofline,
    Row,
    RowParity,
    RowQuality,
    Settings,
    Timing,
    Work,
)

MACHINE = Machine(
    key="cpu-7-test",
    device="cpu",
    cpu="A CPU of a test, 2.1 GHz",
    cores=7,
    threads=7,
    vector=["avx2", "avx512f"],
    memory_bytes=63 * 2**30,
    system="Linux 6.1",
    versions={"torch": "2.13.0", "onnxruntime": "1.31.0", "optimize": "0.1.0"},
    commit="0123abc",
)
SETTINGS = Settings(rounds=7, burst_ms=77, warmup_ms=63, attempts=3, drift=0.05, spread=0.1, seed=1)
LIMITS = Limits(
    target="this CPU",
    how="measured",
    bandwidth_gbs=21.0,
    peak_gflops={"fp32": 140.0, "bf16": 63.0, "int8": 370.0},
    sources=("the best of several copies", "the best of several products"),
)


def timing(ms: float, spread: float = 0.04, stable: bool = True) -> Timing:
    draw = random.Random(round(ms * 1e6))
    rounds = [ms * (1 + spread * draw.uniform(-0.5, 0.5)) for _ in range(7)]
    return Timing(
        median_ms=ms,
        p10_ms=ms * (1 - spread / 2),
        p90_ms=ms * (1 + spread),
        p95_ms=ms * (1 + 1.3 * spread),
        p99_ms=ms * (1 + 2 * spread),
        runs=63,
        rounds_ms=rounds,
        spread=spread,
        drift=0.01 if stable else 0.2,
        attempts=1 if stable else 3,
        stable=stable,
        clock="monotonic",
        cpu_ms=1.9 * ms,
    )


def a_row(
    component: str = "unet",
    backend: str = "eager",
    precision: str = "fp32",
    ms: float = 77.0,
    *,
    shape: str = "default",
    eager_ms: float = 77.0,
    snr_db: float = 120.0,
    state: str = "measured",
    why: str = "",
    gflop: float = 1.0,
    **more: Any,
) -> Row:
    """A candidate's row; a state of "failed" or "skipped" has no figures."""
    named = {"component": component, "role": "unet", "shape": shape, "backend": backend, "precision": precision}
    base: dict[str, Any] = {**named, "sizes": {"batch": 1, "height": 63}, "state": state, "why": why}
    if state in ("failed", "skipped"):
        return Row(**{**base, **more})
    relative = 10 ** (-snr_db / 20)
    intensity = 63.0 if precision == "fp32" else 120.0
    return Row(
        **{
            **base,
            "artifact": f"{component}/{precision}/onnx" if backend.startswith("onnx") else None,
            "parity": RowParity(output="sample", relative=relative, limit=1, rule="a rule", passed=True),
            "quality": RowQuality(
                output="sample",
                cosine=1 - relative**2 / 2,
                lowest=1 - relative**2,
                snr_db=snr_db,
                psnr_db=snr_db + 7,
                samples=7,
                data="random feeds",
            ),
            "timing": timing(ms, stable=state == "measured", spread=0.04 if state == "measured" else 0.4),
            "ratio": Ratio(to="eager fp32", value=ms / eager_ms, low=0.97 * ms / eager_ms, high=1.04 * ms / eager_ms),
            "preparation": Preparation(
                load_s=0.63, compile_s=None if backend == "eager" else 7.7, first_ms=3 * ms, artifact_bytes=63 << 20
            ),
            "memory": Memory(host=int(ms * 7) << 20),
            "throughput_per_s": 1e3 / ms,
            "work": Work(flops=gflop * 1e9, bytes=gflop * 1e9 / intensity, weight_bytes=63e6, how="counted"),
            "roofline": Roofline(
                gflops=gflop * 1e3 / ms,
                gbs=gflop * 1e3 / ms / intensity,
                intensity=intensity,
                share=0.63,
                bound="compute",
                precision=precision if precision in LIMITS.peak_gflops else "fp32",
            ),
            **more,
        }
    )


def a_breakdown(component: str = "unet", backend: str = "eager", run_ms: float = 77.0, **more: Any) -> Breakdown:
    shares = {
        ("down_blocks.0.resnets.0.conv1", "convolution", "aten::conv2d"): 0.4,
        ("down_blocks.0.attentions.0.to_q", "matmul", "aten::linear"): 0.2,
        ("mid_block.attentions.0", "attention", "aten::scaled_dot_product_attention"): 0.14,
        ("up_blocks.1.resnets.0.norm1", "norm", "aten::group_norm"): 0.1,
        ("", "elementwise", "aten::add"): 0.07,
    }
    operators = [
        OperatorTime(module=m, operator=o, kernel=k, ms=share * run_ms, calls=7, flops=1e9 * share, bytes=7e6)
        for (m, o, k), share in shares.items()
    ]
    outside = run_ms - sum(o.ms for o in operators)
    base = {"component": component, "shape": "default", "backend": backend, "precision": "fp32", "run_ms": run_ms}
    return Breakdown(**{**base, "outside_ms": outside, "operators": operators, "how": "torch.profiler", **more})


def a_pipeline(variant: str = "eager fp32", unet_ms: float = 77.0, measured: bool = True, **more: Any) -> PipelineTime:
    parts = [
        PipelinePart(component="text_encoder", candidate=variant, calls=2, ms=14.0),
        PipelinePart(component="unet", candidate=variant, calls=7, ms=7 * unet_ms),
        PipelinePart(component="vae_decoder", candidate=variant, calls=1, ms=63.0),
    ]
    total = sum(p.ms for p in parts)
    base: dict[str, Any] = {"variant": variant, "shape": "default", "steps": 7, "guidance": True, "parts": parts}
    return PipelineTime(
        **{**base, "composed_ms": total, "measured_ms": 1.03 * total if measured else None, "notes": (), **more}
    )


def a_profile(**more: Any) -> Profile:
    """One component, one set of sizes: eager, a faster compiled one, a quantized one; a failure and an inconclusive."""
    rows = (
        a_row(),
        a_row(backend="torch.compile", ms=63.0),
        a_row(backend="onnxruntime", precision="int8", ms=31.0, snr_db=33.0),
        a_row(backend="aoti", ms=60.0, state="inconclusive", why="first and last rounds are 20 % apart"),
        a_row(backend="tensorrt", precision="fp16", state="skipped", why="tensorrt does not run on cpu"),
    )
    base: dict[str, Any] = {
        "made": "2026-02-03T04:05:06+00:00",
        "source": "demo",
        "command": "optimize profile demo --report r",
        "machine": MACHINE,
        "load": Load(seconds=77, others=0.02, stolen=0.0, busy=False),
        "settings": SETTINGS,
        "limits": LIMITS,
        "rows": rows,
    }
    return Profile(**{**base, **more})


def a_full_profile(**more: Any) -> Profile:
    """With every section that a report can have, and a busy machine."""
    base = a_profile()
    pick = Pick(
        component="unet",
        shape="default",
        backend="onnxruntime",
        precision="int8",
        artifact="unet/int8/onnx",
        latency_ms=31.0,
        cosine=0.99975,
        memory_bytes=217 << 20,
        why="the fastest that meets every wish",
        runner_up="torch.compile fp32, 63.0 ms",
    )
    changes = [
        Change(
            component="unet",
            shape="default",
            candidate=candidate,
            before_ms=before,
            after_ms=after,
            ratio=after / before,
            significant=verdict != "same",
            verdict=verdict,
        )
        for candidate, before, after, verdict in (
            ("eager fp32", 76.0, 77.0, "same"),
            ("torch.compile fp32", 77.0, 63.0, "faster"),
            ("onnxruntime int8", 21.0, 31.0, "slower"),
        )
    ]
    estimate = Estimate(
        target="rtx-4090",
        component="unet",
        shape="default",
        precision="fp16",
        latency_ms=0.77,
        bound="memory",
        share=0.6,
        assumptions=["60 % of the sheet's limits", "2 µs for each kernel"],
    )
    return base.model_copy(
        update={
            "load": Load(seconds=77, others=0.63, stolen=0.07, busy=True),
            "breakdowns": (
                a_breakdown(trace="unet.default.eager.fp32.trace.json"),
                a_breakdown(backend="torch.compile", run_ms=63.0),
            ),
            "pipelines": (a_pipeline(), a_pipeline("torch.compile fp32", 63.0, measured=False)),
            "estimates": (estimate,),
            "choice": Choice(
                wishes=["p95<100ms", "cosine>=0.999"],
                met=True,
                picks=[pick],
                front={"unet": ["onnxruntime int8", "torch.compile fp32"]},
                pipeline=a_pipeline("picked", 31.0),
                cost=Cost(
                    price_per_hour=2.1, per_1000=0.77, load_per_second=7, machines=3, per_month=4599, currency="EUR"
                ),
            ),
            "comparison": Comparison(against="old/profile.json", made="2026-01-02T03:04:05+00:00", changes=changes),
            "notes": ("a note of the record",),
            **more,
        }
    )
