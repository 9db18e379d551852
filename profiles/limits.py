"""The roof over a device: measured by running a copy and matrix products, or read from its target sheet.

The copy is that of STREAM (McCalpin): arrays far larger than the last cache, bytes read plus bytes written over the
best time. On a CPU each peak is the best of torch and ONNX Runtime, so that a backend is not held to another's library.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from optimize.errors import InputError, MissingError

from .schema import Limits
from .targets import TARGETS, TargetSheet, sheet_from_name
from .timing import on_cores

SECONDS = 0.3  # for each figure
ROUNDS = 3
CPU_SIZE, CUDA_SIZE = 1024, 8192  # of the square matrices
LEAST_COPY = 256 * 2**20  # bytes of an array


def limits_of_device(device: str = "cpu", threads: int = 0, seconds: float = SECONDS) -> Limits:
    """Measures bandwidth and peaks of "cpu" (with `threads`, 0 for as many as torch takes) or "cuda".

    Takes about `seconds` for each of its figures. MissingError where there is no such device.
    """
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError("unknown device", got=device, expected="cpu or cuda")
    return cpu_limits(threads, seconds) if device == "cpu" else cuda_limits(device, seconds)


@cache
def limits_here(device: str, threads: int = 0) -> Limits:
    """`limits_of_device`, measured once in a process: a machine's limits stay."""
    return limits_of_device(device, threads)


def limits_from_sheet(name: str | TargetSheet) -> Limits:
    """What the vendor prints. Raises InputError for a target without a sheet."""
    sheet = name if isinstance(name, TargetSheet) else sheet_from_name(name)
    if sheet is None:
        raise InputError("there is no sheet of this target", got=name, expected="one of " + ", ".join(TARGETS))
    sources = dict.fromkeys(sheet.source_of(figure) for figure in ("peak", "bandwidth_gbs"))
    return Limits(
        target=sheet.name,
        how="sheet",
        bandwidth_gbs=sheet.bandwidth_gbs,
        peak_gflops={kind: peak * 1e3 for kind, peak in vars(sheet.peak).items() if peak is not None},
        sources=tuple(f"{s.title} <{s.url}>" for s in sources),
    )


# --- a CPU -----------------------------------------------------------------------------------------------------------


def cpu_limits(threads: int = 0, seconds: float = SECONDS) -> Limits:
    """Several rounds over all figures, so that a neighbour's burst of work does not fall on one of them alone."""
    import torch

    least: dict[tuple[str, str], float] = {}
    with on_cores(threads), torch.inference_mode():
        used = torch.get_num_threads()
        runs = cpu_copies() | cpu_products(used)
        for _ in range(ROUNDS):
            for key, (work, run) in runs.items():
                took = best_seconds(run, seconds / ROUNDS)
                least[key] = max(least.get(key, 0.0), work / took / 1e9)
    best: dict[str, tuple[float, str]] = {}
    for (kind, how), rate in least.items():
        best[kind] = max(best.get(kind, (0.0, "")), (rate, how))
    bandwidth, copied = best.pop("bandwidth")
    products = ", ".join(f"{kind} by {library}" for kind, (_, library) in best.items())
    return Limits(
        target="this CPU",
        how="measured",
        bandwidth_gbs=bandwidth,
        peak_gflops={kind: rate for kind, (rate, _) in best.items()},
        sources=(
            f"the best of several copies and sums of arrays of {copy_bytes() >> 20} MiB ({copied}), {used} threads",
            f"the best of several products of {CPU_SIZE} x {CPU_SIZE} matrices, {used} threads: {products}",
        ),
    )


def best_seconds(run: Callable[[], Any], seconds: float) -> float:
    """The shortest of the runs that fit into `seconds`, at least two; one before them warms up."""
    run()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return min(times)


def copy_bytes() -> int:
    """Four times the last cache, and not little; a machine short of memory takes what it has to spare."""
    import psutil

    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    last = max((int(c.read_text().strip().removesuffix("K")) << 10 for c in caches), default=0)
    return min(max(LEAST_COPY, 4 * last), int(psutil.virtual_memory().available) // 8)


Runs = dict[tuple[str, str], tuple[float, Callable[[], Any]]]
"""What is measured and by which way -> its bytes or operations, and one run of it."""


def cpu_copies() -> Runs:
    """A copy reads and writes; a sum reads alone, as a product does with its weights."""
    import torch

    source = torch.ones(copy_bytes() // 4)
    target = torch.zeros_like(source)
    size = source.numel() * 4
    return {
        ("bandwidth", "copy"): (2 * size, lambda: target.copy_(source)),
        ("bandwidth", "sum"): (size, source.sum),
    }


Make = Callable[[int], Callable[[], Any]]
"""Size of a square matrix -> one product of two of them."""


def cpu_products(threads: int) -> Runs:
    """Those that work here. fp16 is not among them: CPUs compute it in fp32."""
    ways: Mapping[tuple[str, str], Make] = {
        ("fp32", "torch"): torch_product("float32"),
        ("fp32", "ONNX Runtime"): ort_product("FLOAT", threads),
        ("bf16", "torch"): torch_product("bfloat16"),
        ("int8", "torch"): int8_product,
        ("int8", "ONNX Runtime"): ort_product("UINT8", threads),
    }
    found: Runs = {}
    for key, make in ways.items():
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError, ImportError):
            run = make(CPU_SIZE)
            run()
            found[key] = (2 * CPU_SIZE**3, run)
    return found


def torch_product(dtype: str, device: str = "cpu") -> Make:
    import torch

    def make(size: int) -> Callable[[], Any]:
        a, b = (torch.rand(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    return make


def int8_product(size: int, device: str = "cpu") -> Callable[[], Any]:
    import torch

    a, b = (torch.randint(-100, 100, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    b = b.t()  # the layout that the matrix units take
    return lambda: torch._int_mm(a, b)


def ort_product(kind: str, threads: int) -> Make:
    """A graph of one product by a constant matrix, which ONNX Runtime packs once, as it does with weights."""

    def make(size: int) -> Callable[[], Any]:
        import numpy as np
        import onnxruntime as ort

        from optimize.quantize.running import session_options

        few = kind == "UINT8"
        values = np.random.default_rng(0).integers(0, 64, (size, size))
        weight = values.astype(np.int8 if few else np.float32)
        session = ort.InferenceSession(
            product_graph(weight, kind), session_options(threads=threads), providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        given = values.astype(np.uint8 if few else np.float32)
        binding.bind_cpu_input("x", given)
        binding.bind_output("y", "cpu")
        return lambda: session.run_with_iobinding(binding)

    return make


def product_graph(weight: Any, kind: str) -> bytes:
    import onnx

    few = kind == "UINT8"
    x, y = (
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DataType.Value(k), weight.shape)
        for n, k in (("x", kind), ("y", "INT32" if few else kind))
    )
    node = onnx.helper.make_node("MatMulInteger" if few else "MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "product", [x], [y], [onnx.numpy_helper.from_array(weight, "w")])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    serialized: bytes = made.SerializeToString()
    return serialized


# --- a GPU -----------------------------------------------------------------------------------------------------------


def cuda_limits(device: str = "cuda", seconds: float = SECONDS) -> Limits:
    """By CUDA events, the best of several bursts: a burst is long enough that its launches cost nothing."""
    import torch

    if not torch.cuda.is_available():
        raise MissingError("there is no GPU to measure", mend="name a target sheet: see `optimize targets`")
    peaks = {}
    with torch.cuda.device(device), torch.inference_mode():
        for kind, make in cuda_products(device).items():
            with tf32(kind == "tf32"):
                rate = cuda_rate(make, CUDA_SIZE, seconds)
            if rate:
                peaks[kind] = rate
        source = torch.ones(2**30 // 4, device=device)
        target = torch.zeros_like(source)
        bandwidth = 2 * 2**30 / cuda_seconds(lambda: target.copy_(source), seconds) / 1e9
        name = torch.cuda.get_device_name()
    return Limits(
        target=name,
        how="measured",
        bandwidth_gbs=bandwidth,
        peak_gflops=peaks,
        sources=(
            "the best of several copies of 1 GiB, read plus written",
            f"the best of several products of {CUDA_SIZE} x {CUDA_SIZE} matrices by torch {torch.__version__}",
        ),
    )


def cuda_products(device: str) -> Mapping[str, Make]:
    return {
        "fp32": torch_product("float32", device),
        "tf32": torch_product("float32", device),
        "fp16": torch_product("float16", device),
        "bf16": torch_product("bfloat16", device),
        "fp8": lambda size: fp8_product(size, device),
        "int8": lambda size: int8_product(size, device),
    }


def fp8_product(size: int, device: str) -> Callable[[], Any]:
    import torch

    a, b = (torch.rand(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def cuda_rate(make: Make, size: int, seconds: float) -> float:
    """GFLOP/s, or 0 where this GPU or this torch has no such product."""
    try:
        return 2 * size**3 / cuda_seconds(make(size), seconds) / 1e9
    except (RuntimeError, NotImplementedError, AttributeError):
        return 0.0


def cuda_seconds(run: Callable[[], Any], seconds: float, burst: int = 5) -> float:
    import torch

    run()
    torch.cuda.synchronize()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(burst):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / burst)
    return min(times)
