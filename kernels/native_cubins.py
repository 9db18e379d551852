"""The Triton kernels as the native library's nodes need them: compiled for each GPU, and written as C to embed.

    pip install . --config-settings=cmake.define.OPTIMIZE_CUBINS=ON     compiles and embeds them; or
    python -m optimize.kernels.native_cubins FOLDER                     compiles them into a folder, on any machine, and
    pip install . --config-settings=cmake.define.OPTIMIZE_CUBINS=FOLDER embeds that

What is in the folder already is not compiled again, so that a stopped build goes on where it was.

A node's tensors are contiguous, and any size may come: these are the kernels' general forms (edges masked, the smaller
units), in fp16 and fp32. What a cubin serves is in its compile-time constants, which the library reads when it chooses.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .aot import Built, built_for, over_limits
from .kernel import SMS, Kernel
from .tuning import digest_of

DTYPES = ("fp16", "fp32")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
"""In the order of the library's enum Gate, whose numbers stand for them."""
HEAD_DIMS = (32, 40, 64, 72, 80, 96, 128, 160, 256, 512)
TEXT = (64, 128)
"""Head sizes of language models and text encoders: short prompts, and one token at a time."""
MANY, FEW = 4096, 128


@dataclasses.dataclass(frozen=True)
class Form:
    """A kernel, by name, and a problem that stands for all that it serves."""

    kernel: str
    problem: Any


def attention_forms() -> Iterator[Form]:
    """For groups of any size, see `kernels`."""
    from .triton_attention import AttentionProblem

    def form(head_dim: int, dtype: str, queries: int = MANY, keys: int = MANY, **rest: Any) -> Form:
        return Form("attention", AttentionProblem(head_dim, dtype, queries, keys, **rest))

    for head_dim, causal in itertools.product(HEAD_DIMS, (False, True)):
        yield from (form(head_dim, dtype, causal=causal) for dtype in DTYPES)
        if head_dim in TEXT or (head_dim <= 128 and not causal):  # all keys in one block
            yield form(head_dim, "fp16", keys=FEW, causal=causal)
    for head_dim, dtype in itertools.product(HEAD_DIMS, DTYPES):
        yield from (form(head_dim, dtype, bias=bias) for bias in (dtype, "bool"))
    for head_dim, bias in itertools.product(TEXT, ("", "fp16", "bool")):
        yield form(head_dim, "fp16", queries=1, group=16, bias=bias)  # packed: rows are the heads of a group


def norm_forms() -> Iterator[Form]:
    """With and without a sum, a gate, a modulation (per batch or per token); rows of up to 1024 and 4096 channels held
    whole where 8 divides them, any others walked twice."""
    from .triton_norms import NONE, PER_BATCH, PER_TOKEN, NormProblem

    shapes = ((1024, 8), (4096, 8), (32767, 1))
    parts: tuple[tuple[bool, int, int], ...] = ((False, NONE, NONE), (True, NONE, NONE))
    parts += tuple(p for kind in (PER_BATCH, PER_TOKEN) for p in ((False, NONE, kind), (True, NONE, kind)))
    parts += tuple(p for kind in (PER_BATCH, PER_TOKEN) for p in ((True, kind, NONE), (True, kind, kind)))
    for dtype, rms, (channels, unit), (added, gate, kind) in itertools.product(
        DTYPES, (False, True), shapes, sorted(set(parts))
    ):
        modulation, bias, residual = dtype if gate or kind else "", "" if rms else dtype, dtype if added else ""
        problem = NormProblem(MANY, channels, dtype, rms, dtype, bias, residual, modulation, gate, kind, kind, unit)
        yield Form("norm", problem)


def group_norm_forms() -> Iterator[Form]:
    from .triton_group_norm import GroupNormProblem

    def problem(group_channels: int, positions: int, dtype: str, silu: bool) -> GroupNormProblem:
        return GroupNormProblem(1, 32 * group_channels, 32, positions, dtype, dtype, dtype, silu)

    for dtype, silu in itertools.product(DTYPES, (False, True)):
        for group_channels, positions in ((16, 1024), (64, 256), (64, 64)):
            yield Form("group_norm", problem(group_channels, positions, dtype, silu))
        for positions in (1 << 16, (1 << 16) - 1):
            yield Form("group_norm_apply", problem(16, positions, dtype, silu))
            if not silu:
                yield Form("group_norm_partial", problem(16, positions, dtype, silu))
    yield Form("group_norm_merge", problem(16, 1 << 16, "fp16", False))


def rope_forms() -> Iterator[Form]:
    """One head, see `rope_on_cuda`."""
    from .triton_rope import HALVES, INTERLEAVED, NO_ROTATION, RopeProblem

    for dtype, rotation, weight, head_dim in itertools.product(
        DTYPES, (NO_ROTATION, INTERLEAVED, HALVES), (False, True), (64, 128, 256, 512)
    ):
        if rotation != NO_ROTATION or weight:
            for unit in (8, 2):
                angles = "fp32" if rotation else ""
                yield Form(
                    "qk_norm_rope",
                    RopeProblem(MANY, 1, 1, head_dim, dtype, dtype if weight else "", angles, rotation, unit),
                )


def gated_forms() -> Iterator[Form]:
    """All in one row."""
    from .triton_gated import GatedProblem

    for dtype, activation, unit in itertools.product(DTYPES, ACTIVATIONS, (16, 1)):
        yield Form("gated", GatedProblem(1, 1 << 20, dtype, activation, unit))


def forms() -> Iterator[Form]:
    """Each once."""
    made = itertools.chain(attention_forms(), norm_forms(), group_norm_forms(), rope_forms(), gated_forms())
    yield from dict.fromkeys(made)


@functools.cache
def kernels() -> Mapping[str, Kernel[Any, Any]]:
    """By name. Attention is told at the launch how many query heads share a key head, and the second pass of group norm
    takes its statistics merged: one form each for groups of all sizes."""
    from . import triton_attention, triton_gated, triton_group_norm, triton_norms, triton_rope

    def grouped(problem: Any, config: Any) -> Any:
        code = triton_attention.compiled(problem, config)
        constants = {name: value for name, value in code.constants.items() if name != "GROUP"}
        return dataclasses.replace(code, signature={**code.signature, "GROUP": "i32"}, constants=constants)

    def merged(problem: Any, config: Any) -> Any:
        types = {"x": problem.dtype, "weight": problem.weight, "bias": problem.bias, "out": problem.dtype}
        types |= {"means": "", "squares": "", "statistics": "fp32"}
        constants = triton_group_norm.apply_meta(problem, config, 0)
        return triton_group_norm.specialised(triton_group_norm.apply_kernel, types, constants, config.warps)

    attention = dataclasses.replace(triton_attention.KERNEL, compiled=grouped)
    apply = dataclasses.replace(triton_group_norm.APPLY, compiled=merged)
    made = (
        attention, triton_gated.KERNEL, triton_group_norm.KERNEL, triton_group_norm.PARTIAL,
        triton_group_norm.MERGE, apply, triton_norms.KERNEL, triton_rope.KERNEL,
    )  # fmt: skip
    return {kernel.name: kernel for kernel in made}


def built(form: Form, sm: int) -> Built:
    return built_for(kernels()[form.kernel], form.problem, sm)


# --- a folder of them ------------------------------------------------------------------------------------------------


def key_of(form: Form, sm: int) -> str:
    """Of all that decides the code: two forms with the same key are one cubin."""
    import triton

    kernel = kernels()[form.kernel]
    code = kernel.compiled(form.problem, kernel.heuristic(form.problem, sm))
    parts = (triton.__version__, digest_of(kernel), form.kernel, sm, dataclasses.asdict(code))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def number(value: Any) -> int | None:
    """A constant as the library reads it; None where no choice depends on it."""
    if value in ACTIVATIONS:
        return ACTIVATIONS.index(value)
    return int(value) if isinstance(value, int) else None


def facts(b: Built) -> dict[str, Any]:
    """What the library has to know to choose and launch it; nothing where it does not fit its GPU."""
    if over_limits(b) or b.scratch_bytes:
        return {}
    return {
        "kernel": b.kernel,
        "entry": b.entry,
        "arguments": " ".join(f"{name}:{kind}" for name, kind in b.arguments),
        "constants": " ".join(f"{k}={n}" for k, v in b.constants.items() if (n := number(v)) is not None),
        "sm": b.sm,
        "shared_bytes": b.shared_bytes,
        "num_warps": b.num_warps,
    }


def put(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def compile_one(folder: Path, key: str, form: Form, sm: int) -> None:
    """KEY.cubin and, when that is there, KEY.json."""
    b = built(form, sm)
    known = facts(b)
    if known:
        put(folder / f"{key}.cubin", b.cubin)
    put(folder / f"{key}.json", json.dumps(known).encode())


def prepare(cache: str) -> None:
    """Before Triton is asked for anything. Line numbers are two thirds of a cubin; what Triton keeps of all these
    compilations in a cache would be ten times their size."""
    os.environ |= {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_CACHE_DIR": cache}


def compile_all(
    folder: Path, which: Iterable[Form], sms: Iterable[int] = SMS, workers: int | None = None
) -> list[Path]:
    """Compiles each form for each GPU into the folder, in processes of their own, and writes the table of just these.

    Returns the cubins; a form that does not fit a GPU has none."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {key_of(form, sm): (form, sm) for form, sm in itertools.product(which, sms)}
    missing = [(folder, key, *job) for key, job in jobs.items() if not (folder / f"{key}.json").exists()]
    if missing:
        context, start = multiprocessing.get_context("spawn"), time.monotonic()
        with (
            tempfile.TemporaryDirectory() as cache,
            concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), context, prepare, (cache,)) as pool,
        ):
            tenth = max(1, len(missing) // 10)
            for n, _ in enumerate(pool.map(compile_one, *zip(*missing, strict=True), chunksize=4), 1):
                if n % tenth == 0:
                    print(f"{n} of {len(missing)} cubins, {time.monotonic() - start:.0f} s", flush=True)
    return write_table(folder, jobs)


def write_table(folder: Path, keys: Iterable[str]) -> list[Path]:
    """`cubins.S`, which includes the cubins, and `cubins.inc`, their table. Returns the cubins."""
    rows, sources, cubins = [], [], []
    for key in sorted(keys):
        known = json.loads((folder / f"{key}.json").read_text())
        if not known:
            continue
        symbol = f"optimize_cubin_{key}"
        cubins.append(folder / f"{key}.cubin")
        texts = ", ".join(f'"{known[name]}"' for name in ("kernel", "entry", "arguments", "constants"))
        numbers = ", ".join(str(known[name]) for name in ("sm", "shared_bytes", "num_warps"))
        rows.append(f"CUBIN({symbol}, {texts}, {numbers})\n")
        sources += [
            f".global {symbol}_begin", f".global {symbol}_end", f".hidden {symbol}_begin", f".hidden {symbol}_end",
            ".balign 64", f"{symbol}_begin:", f'.incbin "{key}.cubin"', f"{symbol}_end:",
        ]  # fmt: skip
    head, tail = ".section .rodata", '.section .note.GNU-stack,"",%progbits'
    put(folder / "cubins.S", "\n".join([head, *sources, tail, ""]).encode())
    put(folder / "cubins.inc", "".join(rows).encode())
    return cubins


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m optimize.kernels.native_cubins", description="Cubins to embed.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sm", type=int, action="append", choices=SMS, help="only for these (default: all)")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    asked = parser.parse_args(words)
    cubins = compile_all(asked.folder, [f for f in forms() if asked.kernel in f.kernel], asked.sm or SMS)
    print(f"{len(cubins)} cubins in {asked.folder}, {sum(c.stat().st_size for c in cubins) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
