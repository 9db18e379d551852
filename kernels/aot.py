"""Compiles every shipped kernel ahead of time, with no GPU, and checks what it takes against each GPU's limits.

    python -m optimize.kernels.aot --table      prints registers, spills and shared memory, and what regressed
    python -m optimize.kernels.aot --write      the same, and writes the committed table resources.json

Triton rejects nothing that does not fit (164 KB of shared memory compile for a GPU of 99), so this does. Compiling and
interpreting cannot share a process.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.errors import InputError, InternalError

from .kernel import LIMITS, SMS, Compiled, Kernel
from .select import interpreting
from .tuning import digest_of

KERNELS = (
    "triton_attention:KERNEL",
    "triton_gated:KERNEL",
    "triton_group_norm:KERNEL",
    "triton_group_norm:PARTIAL",
    "triton_group_norm:MERGE",
    "triton_group_norm:APPLY",
    "triton_norms:KERNEL",
    "triton_rope:KERNEL",
)
"""Every kernel that is shipped, as module:name."""
TABLE = Path(__file__).with_name("resources.json")
REGISTERS_MORE = 8
"""Registers that a kernel may take more than the committed table says: what another ptxas schedules differently."""
SPILLS_MORE = 16
"""Bytes of stack, likewise."""
TENSOR_COLUMNS = 512
"""Of sm_100's tensor memory, per block. Triton 3.7.1 makes an empty kernel of what takes more."""
ACCEPT = "python -m optimize.kernels.aot --write"


@dataclass(frozen=True)
class Job:
    """One kernel for one problem and one GPU."""

    kernel: str  # a name of KERNELS
    index: int  # of the problem in the kernel's shipped list
    sm: int


@dataclass(frozen=True)
class Built:
    """A cubin and how to launch it. `arguments` are (name, type) in order: what the launch passes, then the two scratch
    pointers that Triton appends, which may be null where `scratch_bytes` is 0."""

    kernel: str
    problem: Mapping[str, Any]
    config: Mapping[str, Any]
    sm: int
    entry: str
    cubin: bytes
    shared_bytes: int  # to pass as dynamic shared memory
    static_shared_bytes: int  # what the driver adds to it (1 KB that sm_90 and newer reserve)
    registers: int
    spill_bytes: int
    num_warps: int
    scratch_bytes: int
    tensor_columns: int  # of sm_100's tensor memory
    arguments: tuple[tuple[str, str], ...]
    constants: Mapping[str, Any]

    @property
    def key(self) -> str:
        problem = ", ".join(f"{name}={value}" for name, value in self.problem.items())
        return f"{self.kernel}, sm_{self.sm}: {problem}"


def kernel_of(name: str) -> Kernel[Any, Any]:
    module, _, attribute = name.partition(":")
    found: Kernel[Any, Any] = getattr(importlib.import_module(f"{__package__}.{module}"), attribute)
    return found


def jobs(kernels: Iterable[str] = KERNELS, sms: Iterable[int] = SMS) -> Iterator[Job]:
    for name in kernels:
        for index, _ in enumerate(kernel_of(name).shipped):
            yield from (Job(name, index, sm) for sm in sms)


# --- compiling -------------------------------------------------------------------------------------------------------


def compiled_for(jit: Any, code: Compiled, sm: int) -> Any:
    """Triton's compiled kernel, by Triton's own cache on disk. `jit`: a function of Triton or of Gluon."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    if interpreting():
        raise InputError(
            "nothing can be compiled while Triton interprets",
            got="TRITON_INTERPRET=1",
            mend="unset it, in a new process",
        )
    places = {name: (i,) for i, name in enumerate(code.signature)}
    source = (GluonASTSource if jit.is_gluon() else ASTSource)(
        jit,
        dict(code.signature),
        {places[name]: value for name, value in code.constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in code.divisible_by_16},
    )
    options = {"num_warps": code.num_warps, "num_stages": code.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, stack bytes (spills) and static shared bytes, as Triton's own cuobjdump reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said))
    if {"REG", "STACK", "SHARED", "LOCAL"} - found.keys():
        raise InternalError(f"cuobjdump -res-usage gives no registers: {said!r}")
    return {
        "registers": int(found["REG"]),
        "spill_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "static_shared_bytes": int(found["SHARED"]),
    }


def built(job: Job) -> Built:
    kernel = kernel_of(job.kernel)
    return built_for(kernel, kernel.shipped[job.index], job.sm)


def built_for(kernel: Kernel[Any, Any], problem: Any, sm: int) -> Built:
    """Compiled with the heuristic's config."""
    config = kernel.heuristic(problem, sm)
    code = kernel.compiled(problem, config)
    binary = compiled_for(kernel.jit, code, sm)
    passed = tuple((name, kind) for name, kind in code.signature.items() if kind != "constexpr")
    return Built(
        kernel=kernel.name,
        problem=dataclasses.asdict(problem),
        config=dataclasses.asdict(config),
        sm=sm,
        entry=binary.metadata.name,
        cubin=binary.asm["cubin"],
        shared_bytes=binary.metadata.shared,
        num_warps=binary.metadata.num_warps,
        scratch_bytes=binary.metadata.global_scratch_size + (binary.metadata.profile_scratch_size or 0),
        tensor_columns=getattr(binary.metadata, "tmem_size", None) or 0,
        arguments=(*passed, ("global_scratch", "*i8"), ("profile_scratch", "*i8")),
        constants=dict(code.constants),
        **resources(binary.asm["cubin"]),
    )


def built_all(which: Iterable[Job], workers: int | None = None) -> list[Built]:
    """All of them, in processes of their own (a compile does not release the interpreter)."""
    workers = workers or min(os.cpu_count() or 1, 8)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(built, which, chunksize=2))


# --- judging ---------------------------------------------------------------------------------------------------------


def over_limits(b: Built) -> list[str]:
    """What this kernel takes more of than its GPU has."""
    limits = LIMITS[b.sm]
    checks = (
        ("registers a thread", b.registers, limits.registers_per_thread),
        ("registers a block", b.registers * 32 * b.num_warps, limits.registers_per_block),
        ("bytes of shared memory", b.shared_bytes, limits.shared_bytes),
        ("columns of tensor memory", b.tensor_columns, TENSOR_COLUMNS),
    )
    return [f"{b.key}: {got} {what}, and there are {most}" for what, got, most in checks if got > most]


def row_of(b: Built) -> dict[str, Any]:
    """A row of the committed table."""
    return {
        "config": dict(b.config),
        "registers": b.registers,
        "spill_bytes": b.spill_bytes,
        "shared_bytes": b.shared_bytes,
        "warps": b.num_warps,
    }


def committed() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())["kernels"] if TABLE.exists() else {}
    return rows


def regressions(found: Iterable[Built], table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What takes more than the table says, and what the table does not know."""
    worse = []
    for b in found:
        old, new = table.get(b.key), row_of(b)
        if old is None:
            worse.append(f"{b.key}: not in the table")
            continue
        for name, more in (("registers", REGISTERS_MORE), ("spill_bytes", SPILLS_MORE), ("shared_bytes", 0)):
            if new[name] > old[name] + more:
                worse.append(f"{b.key}: {name} {old[name]} -> {new[name]}")
    return worse


def lines(found: Iterable[Built]) -> Iterator[str]:
    yield f"{'registers':>9} {'spilled':>8} {'shared':>7} {'of':>7} {'warps':>5}  kernel"
    for b in found:
        limit = LIMITS[b.sm].shared_bytes
        yield f"{b.registers:>9} {b.spill_bytes:>8} {b.shared_bytes:>7} {limit:>7} {b.num_warps:>5}  {b.key}"


def write_table(found: Iterable[Built]) -> None:
    import triton

    rows = {b.key: row_of(b) for b in found}
    with tempfile.NamedTemporaryFile("w", dir=TABLE.parent, suffix=".json", delete=False) as file:
        rest = ",\n".join(f" {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items()))
        file.write(f'{{"triton": {json.dumps(triton.__version__)}, "kernels": {{\n{rest}\n}}}}\n')
    Path(file.name).chmod(0o644)
    Path(file.name).replace(TABLE)


# --- shipping --------------------------------------------------------------------------------------------------------


def cubins(out_dir: Path, found: Iterable[Built] | None = None) -> Path:
    """Writes each shipped cubin and `index.json`, and returns the index: what a launcher without Python needs.

    `{"kernels": [{"kernel", "problem", "config", "sm", "file", "entry", "shared_bytes", "num_warps", "scratch_bytes",
    "arguments": [[name, type], ...], "constants", "source": digest}, ...]}`. A pointer's type is "*fp16" and the like;
    "i32", "i64" and "fp32" are passed by value. The last two arguments are Triton's scratch pointers.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    digests = {kernel_of(name).name: digest_of(kernel_of(name)) for name in KERNELS}
    entries = []
    for i, b in enumerate(built_all(jobs()) if found is None else found):
        file = f"{b.kernel}_sm{b.sm}_{i:04}.cubin"
        (out_dir / file).write_bytes(b.cubin)
        entry = {f.name: getattr(b, f.name) for f in dataclasses.fields(b) if f.name != "cubin"}
        entries.append(entry | {"file": file, "source": digests[b.kernel]})
    index = out_dir / "index.json"
    index.write_text(json.dumps({"kernels": entries}, indent=1) + "\n")
    return index


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m optimize.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print the table and what regressed")
    parser.add_argument("--write", action="store_true", help="write the committed table anew")
    parser.add_argument("--cubins", type=Path, metavar="FOLDER", help="write the cubins and their index")
    parser.add_argument("--kernel", help="only those whose name contains this")
    asked = parser.parse_args(words)
    if asked.write and asked.kernel:
        parser.error("--write writes the whole table: leave --kernel out")
    found = built_all(jobs(name for name in KERNELS if (asked.kernel or "") in name))
    print("\n".join(lines(found)))
    wrong = [x for b in found for x in over_limits(b)]
    worse = regressions(found, committed())
    for text in wrong:
        print(f"over the limit: {text}", file=sys.stderr)
    for text in worse:
        print(f"{'was accepted' if asked.write else 'regressed'}: {text}", file=sys.stderr)
    if asked.write and not wrong:
        write_table(found)
    elif worse:
        print(f"to accept it: {ACCEPT}", file=sys.stderr)
    if asked.cubins:
        cubins(asked.cubins, found)
    return 1 if wrong or (worse and not asked.write) else 0


if __name__ == "__main__":
    sys.exit(main())
