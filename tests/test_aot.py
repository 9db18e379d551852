"""Every shipped kernel compiles for every GPU, fits into it, and takes no more than the committed table says."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

from optimize.errors import InternalError
from optimize.kernels import aot, triton_attention
from optimize.kernels.aot import Built
from optimize.kernels.kernel import LIMITS, SMS


@pytest.fixture(scope="module")
def shipped() -> list[Built]:
    """Minutes on two cores when Triton's cache on disk is empty."""
    return aot.built_all(aot.jobs())


def test_every_kernel_is_compiled_for_every_gpu(shipped: list[Built]) -> None:
    expected = sum(len(aot.kernel_of(name).shipped) for name in aot.KERNELS) * len(SMS)
    assert len(shipped) == len({b.key for b in shipped}) == expected
    assert all(b.cubin[:4] == b"\x7fELF" for b in shipped)
    assert {b.sm for b in shipped} == set(SMS)


def test_nothing_is_over_its_gpus_limits(shipped: list[Built]) -> None:
    assert [line for b in shipped for line in aot.over_limits(b)] == []


def test_nothing_takes_more_than_the_committed_table_says(shipped: list[Built]) -> None:
    worse = aot.regressions(shipped, aot.committed())
    assert not worse, "\n".join((*worse, f"to accept it: {aot.ACCEPT}"))


def test_the_table_has_nothing_that_is_not_shipped(shipped: list[Built]) -> None:
    gone = aot.committed().keys() - {b.key for b in shipped}
    assert not gone, f"drop {sorted(gone)[:3]} with {aot.ACCEPT}"


def test_no_kernel_is_empty(shipped: list[Built]) -> None:
    """Triton makes an empty kernel of what does not fit into tensor memory: one of 4 registers."""
    assert [b.key for b in shipped if b.registers < 10] == []


def test_no_scratch_is_needed(shipped: list[Built]) -> None:
    """The native launcher passes null for both scratch pointers."""
    assert [b.key for b in shipped if b.scratch_bytes] == []


def attention(sm: int, *config: int) -> Built:
    """One kernel with a config of the test's choice."""
    problem = dataclasses.replace(triton_attention.KERNEL.shipped[0], head_dim=128)
    chosen = triton_attention.AttentionConfig(*config)
    kernel = dataclasses.replace(triton_attention.KERNEL, heuristic=lambda p, s: chosen, shipped=(problem,))
    return aot.built_for(kernel, problem, sm)


def test_too_much_shared_memory_is_found() -> None:
    """Triton compiles 160 KB for a GPU that has 99."""
    (line,) = aot.over_limits(attention(89, 128, 128, 8, 3))
    assert "bytes of shared memory, and there are 101376" in line and "sm_89" in line
    assert (
        triton_attention.prune(
            dataclasses.replace(triton_attention.KERNEL.shipped[0], head_dim=128),
            triton_attention.AttentionConfig(128, 128, 8, 3),
            89,
        )
        == "about 196608 bytes of shared memory, and there are 101376"
    )


def test_spills_are_seen() -> None:
    assert attention(80, 128, 128, 4, 2).spill_bytes > 500


def test_too_much_tensor_memory_is_found() -> None:
    problem = triton_attention.AttentionProblem(512, "fp16", 4096, 4096)
    config = triton_attention.AttentionConfig(128, 32, 8, 1)
    kernel = dataclasses.replace(triton_attention.KERNEL, heuristic=lambda p, s: config)
    assert any("tensor memory" in line for line in aot.over_limits(aot.built_for(kernel, problem, 100)))
    assert any("tensor memory" in why for why in triton_attention.reasons(problem, config, 100))


@pytest.mark.parametrize("head_dim", [64, 160, 256, 512])
def test_fp32_does_not_spill(head_dim: int) -> None:
    """It is multiplied outside the tensor cores, from registers; it is compiled where it is used, and not shipped."""
    b = aot.built_for(triton_attention.KERNEL, triton_attention.AttentionProblem(head_dim, "fp32", 4096, 4096), 89)
    assert b.spill_bytes == 0 and aot.over_limits(b) == []


def test_a_regression_names_the_kernel_and_both_figures(shipped: list[Built]) -> None:
    b = shipped[0]
    table = {b.key: aot.row_of(b)}
    assert aot.regressions([b], table) == []
    assert aot.regressions([b], {}) == [f"{b.key}: not in the table"]
    for name, less in (("registers", 9), ("spill_bytes", 17), ("shared_bytes", 1)):
        old = aot.row_of(b) | {name: aot.row_of(b)[name] - less}
        assert aot.regressions([b], {b.key: old}) == [f"{b.key}: {name} {old[name]} -> {aot.row_of(b)[name]}"]


def test_the_index_of_the_cubins_is_enough_to_launch_them(shipped: list[Built], tmp_path: Path) -> None:
    some = [b for b in shipped if b.sm == 90]
    index = json.loads(aot.cubins(tmp_path / "cubins", some).read_text())["kernels"]
    assert len(index) == len(some)
    for entry, b in zip(index, some, strict=True):
        cubin = (tmp_path / "cubins" / entry["file"]).read_bytes()
        assert cubin == b.cubin and entry["entry"].encode() in cubin
        assert 0 <= entry["shared_bytes"] <= LIMITS[90].shared_bytes and entry["num_warps"] in (1, 2, 4, 8, 16, 32)
        names = [name for name, _ in entry["arguments"]]
        assert names[-2:] == ["global_scratch", "profile_scratch"]
        assert {kind for _, kind in entry["arguments"]} <= {
            "*fp16",
            "*bf16",
            "*fp32",
            "*i1",
            "*i8",
            "i32",
            "i64",
            "fp32",
        }
        assert not set(names) & entry["constants"].keys()
        assert len(entry["source"]) == 64


def parameters_of(cubin: bytes, folder: Path) -> list[tuple[int, int]]:
    """(offset, size) of each parameter in order, as the cubin itself has them."""
    import triton

    path = folder / "one.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-elf", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Ordinal : 0x(\w+)\s+Offset  : 0x(\w+)\s+Size    : 0x(\w+)", text)
    numbers = sorted(tuple(int(x, 16) for x in row) for row in found)
    assert [row[0] for row in numbers] == list(range(len(numbers)))
    return [(offset, size) for _, offset, size in numbers]


@pytest.mark.parametrize("name", aot.KERNELS)
def test_the_arguments_of_the_index_are_those_of_the_cubin(name: str, shipped: list[Built], tmp_path: Path) -> None:
    """Each at its natural alignment: pointers and 64-bit numbers take 8 bytes, the others 4."""
    b = next(b for b in shipped if b.kernel == aot.kernel_of(name).name and b.sm == 90)
    expected, at = [], 0
    for _, kind in b.arguments:
        size = 4 if kind in ("i32", "fp32") else 8
        at = -(-at // size) * size
        expected.append((at, size))
        at += size
    assert parameters_of(b.cubin, tmp_path) == expected


def test_compiling_while_interpreting_is_refused() -> None:
    code = "from optimize.kernels import aot; aot.built(aot.Job('triton_attention:KERNEL', 0, 90))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0 and "nothing can be compiled while Triton interprets" in run.stderr


def test_a_cubin_that_is_none_is_no_kernel_of_zero_registers() -> None:
    with pytest.raises(InternalError, match="gives no registers"):
        aot.resources(b"\x7fELF nothing")
