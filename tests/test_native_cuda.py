"""The native library's CUDA side as far as it goes without a GPU: which cubin is chosen, and how arguments are packed.

The driver is a library of ours that prints what it is asked to launch (tests/native/fakecuda.c). It reads the sizes of
the parameters from the cubins themselves. Nothing runs on a GPU here, and no result is checked.
"""

import dataclasses
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimize.kernels import native_cubins

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs a process that does not interpret: nothing compiles in one"
)


Build = Callable[..., Path]


def wanted(form: native_cubins.Form) -> bool:
    """A few forms of each kernel: what the problems of packing.cpp take, and others that they must not take."""
    p = form.problem
    if getattr(p, "dtype", "fp16") != "fp16":
        return form.kernel == "gated" and p.activation == "silu" and p.unit == 1
    keep = {
        "attention": lambda: p.head_dim in (40, 64) and not p.causal,
        "norm": lambda: not p.rms and p.residual and p.gate and p.scale and p.channels < 32767,
        "group_norm": lambda: p.silu,
        "qk_norm_rope": lambda: p.weight and p.head_dim == 128,
        "gated": lambda: p.unit == 1 or p.activation == "silu",
    }
    return bool(keep.get(form.kernel, lambda: True)())


@pytest.fixture(scope="module")
def folder() -> Path:
    """Embedded cubins of sm_80 and sm_90, and the program that launches them."""
    made = Path(__file__).parent.parent / "build" / "tests-cubins"
    forms = [f for f in native_cubins.forms() if wanted(f)]
    native_cubins.compile_all(made, forms, (80, 90))
    return made


@pytest.fixture(scope="module")
def program(folder: Path, native_build: Build) -> Path:
    return native_build("tests-packing", "packing", f"-DOPTIMIZE_CUBINS={folder}")


def ran(program: Path, *problems: str, sm: int = 90) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"LD_LIBRARY_PATH": str(program.parent / "fake"), "FAKE_SM": str(sm)}
    return subprocess.run([str(program), *problems], env=env, capture_output=True, text=True, check=False)


def digest(cubin: bytes) -> int:
    """FNV-1a of an ELF file up to the end of its section table."""
    (offset,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    value = 0xCBF29CE484222325
    for byte in cubin[: offset + size * count]:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def table(folder: Path) -> list[dict[str, Any]]:
    rows = []
    pattern = r'CUBIN\((\w+), "(.*?)", "(.*?)", "(.*?)", "(.*?)", (\d+), (\d+), (\d+)\)'
    for symbol, kernel, entry, arguments, constants, sm, shared, warps in re.findall(
        pattern, (folder / "cubins.inc").read_text()
    ):
        rows.append(
            {
                "kernel": kernel,
                "digest": digest((folder / f"{symbol.removeprefix('optimize_cubin_')}.cubin").read_bytes()),
                "entry": entry,
                "arguments": [a.split(":") for a in arguments.split()],
                "constants": {k: int(v) for k, v in (c.split("=") for c in constants.split())},
                "sm": int(sm),
                "shared": int(shared),
                "warps": int(warps),
            }
        )
    return rows


def launches(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"launch (\w+) cubin (\w+) grid (\d+) block (\d+) shared (\d+) allowed (\d+) stream (\w+):(.*)", done.stdout
    )
    return [
        {
            "entry": entry, "digest": int(cubin, 16), "grid": int(grid), "block": int(block),
            "shared": int(shared), "allowed": int(allowed),
            "stream": stream, "values": [(int(s), int(v, 16)) for s, v in (x.split(":") for x in values.split())],
        }
        for entry, cubin, grid, block, shared, allowed, stream, values in found
    ]  # fmt: skip


SIZES = {"i32": 4, "fp32": 4, "i64": 8}


def number(kind: str, raw: int) -> float | int:
    if kind == "fp32":
        value: float = struct.unpack("f", struct.pack("I", raw))[0]
        return value
    return raw


def matched(launch: dict[str, Any], rows: list[dict[str, Any]], sm: int = 90) -> tuple[dict[str, Any], dict[str, Any]]:
    """(row of the cubin that was launched, its arguments by name). The launch is as the row says."""
    (row,) = (r for r in rows if r["digest"] == launch["digest"])
    assert (row["entry"], row["sm"]) == (launch["entry"], sm)
    assert (launch["block"], launch["shared"]) == (32 * row["warps"], row["shared"])
    assert [SIZES.get(kind, 8) for _, kind in row["arguments"]] == [size for size, _ in launch["values"]]
    names = {name: number(kind, raw) for (name, kind), (_, raw) in zip(row["arguments"], launch["values"], strict=True)}
    return row, names


def test_attention(folder: Path, program: Path) -> None:
    (launch,) = launches(ran(program, "attention"))
    row, values = matched(launch, table(folder))
    assert values == {
        "q": 0x10000, "k": 0x20000, "v": 0x30000, "out": 0x40000, "global_scratch": 0, "profile_scratch": 0,
        "q_batch": 8 * 300 * 40, "q_head": 300 * 40, "q_token": 40, "k_batch": 8 * 77 * 40, "k_head": 77 * 40,
        "k_token": 40, "v_batch": 8 * 77 * 40, "v_head": 77 * 40, "v_token": 40, "out_batch": 8 * 300 * 40,
        "out_head": 300 * 40, "out_token": 40, "bias_batch": 0, "bias_head": 0, "bias_query": 0, "bias_key": 0,
        "programs": 8, "queries": 300, "keys": 77, "blocks": math.ceil(300 / row["constants"]["BLOCK_M"]), "scale": 0.5,
        "GROUP": 1,
    }  # fmt: skip
    assert row["constants"]["ONE_BLOCK"] == 1, "77 keys fit into one block"
    assert launch["grid"] == 2 * 8 * values["blocks"] and launch["stream"] == "0x77"
    assert launch["allowed"] == (launch["shared"] if launch["shared"] > 48 << 10 else 0)


def test_attention_with_packed_heads(folder: Path, program: Path) -> None:
    """The same kernel: heads lie side by side in a token."""
    (launch,) = launches(ran(program, "packed"))
    (apart,) = launches(ran(program, "attention"))
    assert (launch["digest"], launch["grid"]) == (apart["digest"], apart["grid"])
    _, values = matched(launch, table(folder))
    steps = [[values[f"{name}_{of}"] for of in ("batch", "head", "token")] for name in ("q", "k", "v", "out")]
    assert steps == [[n * 8 * 40, 40, 8 * 40] for n in (300, 77, 77, 300)]


def test_attention_with_a_bias(folder: Path, program: Path) -> None:
    (launch,) = launches(ran(program, "bias"))
    row, values = matched(launch, table(folder))
    assert (values["bias"], values["bias_batch"], values["bias_head"], values["bias_key"]) == (0x50000, 77, 0, 1)
    assert (row["constants"]["KIND"], row["constants"]["HEAD"]) == (1, 40) and dict(row["arguments"])["bias"] == "*fp16"


def test_attention_with_shared_key_heads(folder: Path, program: Path) -> None:
    """One form serves groups of any size; where there are few rows, those of a group stand in one block."""
    many, one = launches(ran(program, "grouped", "one_token"))
    rows = table(folder)
    (row, values), (packed, ones) = matched(many, rows), matched(one, rows)
    assert "GROUP" not in row["constants"] and values["GROUP"] == ones["GROUP"] == 4
    assert (row["constants"]["PACK"], values["programs"]) == (0, 8), "each query head on its own"
    assert (packed["constants"]["PACK"], ones["programs"], one["grid"]) == (1, 2, 2 * 2), "a block for each key head"
    assert packed["constants"]["BLOCK_M"] == 16 and (values["q_batch"], values["k_batch"]) == (8 * 19200, 2 * 19200)


def test_norm(folder: Path, program: Path) -> None:
    (launch,) = launches(ran(program, "norm"))
    row, values = matched(launch, table(folder))
    names = ("x", "residual", "gate", "weight", "bias", "scale", "shift", "out", "total")
    assert [values[n] for n in names] == [n * 0x10000 for n in range(1, 10)]
    assert (row["constants"]["GATE"], row["constants"]["BLOCK"]) == (1, 1024), "the narrowest that holds 640 channels"
    per_batch = math.ceil(3 / row["constants"]["ROWS"])
    assert (values["tokens"], values["channels"], values["eps"]) == (3, 640, 0.25)
    assert (values["blocks"], values["blocks_per_batch"], launch["grid"]) == (2 * per_batch, per_batch, 2 * per_batch)
    strides = [values[f"{n}_{of}"] for n in ("x", "gate", "scale", "shift") for of in ("batch", "token")]
    assert strides == [3 * 640, 640, 640, 0, 640, 0, 0, 0]


def test_group_norm_in_one_pass(folder: Path, program: Path) -> None:
    (launch,) = launches(ran(program, "group_norm"))
    row, values = matched(launch, table(folder))
    assert (launch["grid"], values["groups"], values["group_channels"], values["positions"]) == (64, 32, 10, 64)
    assert row["constants"]["CHANNELS"] >= 10 and row["constants"]["POSITIONS"] >= 64


def test_group_norm_in_chunks(folder: Path, program: Path) -> None:
    done = ran(program, "group_norm_in_chunks")
    found = launches(done)
    assert [x["entry"] for x in found] == ["partial_kernel", "merge_kernel", "apply_kernel"]
    rows = table(folder)
    (first, one), (_, two), (last, three) = (matched(x, rows) for x in found)
    chunk = first["constants"]["TILES"] * first["constants"]["POSITIONS"]
    chunks = math.ceil(70000 / chunk)
    assert (two["chunk"], two["chunks"], one["chunks"], two["positions"]) == (chunk, chunks, chunks, 70000)
    assert found[0]["grid"] == 2 * math.ceil(320 / first["constants"]["CHANNELS"]) * chunks and found[1]["grid"] == 64
    assert found[2]["grid"] == 2 * three["channel_blocks"] * math.ceil(70000 / last["constants"]["POSITIONS"])
    assert two["means"] == one["means"] == 0xABC000 and three["statistics"] == two["statistics"]
    held = int(re.search(r"allocate (\d+) stream 0x77", done.stdout)[1])  # type: ignore[index]
    assert two["statistics"] + 2 * 2 * 32 * 4 <= 0xABC000 + held and two["squares"] >= 0xABC000 + 2 * chunks * 320 * 4
    assert done.stdout.rstrip().endswith("free abc000 stream 0x77")


def test_rope_takes_heads_as_batches(folder: Path, program: Path) -> None:
    found = launches(ran(program, "rope"))
    rows = table(folder)
    values = [matched(x, rows)[1] for x in found]
    assert [(v["q"], v["q_out"], v["q_weight"]) for v in values] == [(0x10000, 0x30000, 0x50000), (0x20000, 0x40000, 0x60000)]  # noqa: E501  # fmt: skip
    assert [(v["q_batch"], v["q_token"], v["cos_token"], v["cos_batch"]) for v in values] == [(1280, 128, 64, 0)] * 2
    assert [x["grid"] // values[0]["token_blocks"] for x in found] == [8, 4], "batch times heads"
    by_batch = [matched(x, rows)[1] for x in launches(ran(program, "rope_by_batch"))]
    assert [v["cos"] - 0x70000 for v in by_batch] == [0, 2560, 0, 2560], "each batch has its angles"
    assert [v["q"] & 0xFFFF for v in by_batch] == [0, 4 * 1280 * 2, 0, 2 * 1280 * 2]


def test_gated(folder: Path, program: Path) -> None:
    (launch,) = launches(ran(program, "gated"))
    row, values = matched(launch, table(folder))
    assert (row["constants"]["ACTIVATION"], row["constants"]["UNIT"]) == (2, 1), "16 does not divide 5000"
    assert (values["rows"], values["columns"], values["value"], values["out"]) == (1, 5000, 0x10000, 0x30000)
    assert launch["grid"] == values["blocks"] == math.ceil(5000 / row["constants"]["BLOCK"])


def test_a_later_gpu_of_the_same_generation(folder: Path, program: Path) -> None:
    """A cubin of sm_80 runs on sm_89, none of sm_90 does."""
    (launch,) = launches(ran(program, "gated", sm=89))
    matched(launch, table(folder), sm=80)


@pytest.mark.parametrize("sm", [75, 100])
def test_a_gpu_without_cubins(program: Path, sm: int) -> None:
    done = ran(program, "gated", sm=sm)
    assert done.returncode == 1
    assert re.search(
        rf"no CUDA kernel gated for sm_{sm}, .*: this library's \d+ cubins have none for it; run", done.stderr
    )


def test_a_pointer_that_the_kernels_cannot_take(program: Path) -> None:
    done = ran(program, "misaligned")
    assert done.returncode == 1 and "value is not aligned to 16 bytes" in done.stderr


def test_without_a_driver(program: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    done = subprocess.run([str(program), "gated"], env=env, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        pytest.skip("needs a machine without a CUDA driver")
    assert "ai.optimize: no CUDA driver" in done.stderr or "cuCtx" in done.stderr or "no CUDA context" in done.stderr


def test_without_cubins(native_build: Build) -> None:
    program = native_build("tests-native", "packing")
    done = ran(program, "attention")
    assert (
        done.returncode == 1
        and "this library was built without cubins; run the model without the library" in done.stderr
    )


def test_what_is_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    """And what was stopped goes on: a cubin counts when its JSON is there."""
    forms = [f for f in native_cubins.forms() if f.kernel == "gated"][:4]

    def compiled() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in native_cubins.compile_all(tmp_path, forms, (90,), workers=1)}

    first = compiled()
    table = (tmp_path / "cubins.inc").read_text()
    assert len(first) == len(forms) == table.count("CUBIN(") and compiled() == first
    lost = max(first)
    lost.with_suffix(".json").unlink()
    second = compiled()
    assert {path for path in first if first[path] != second[path]} == {lost}
    assert (tmp_path / "cubins.inc").read_text() == table and not list(tmp_path.glob("*.part"))


def test_the_table_has_what_was_asked_for(tmp_path: Path) -> None:
    """Not what else the folder has: a cubin of an earlier source stays out."""
    forms = [f for f in native_cubins.forms() if f.kernel == "gated"][:2]
    native_cubins.compile_all(tmp_path, forms, (90,), workers=1)
    (only,) = native_cubins.compile_all(tmp_path, forms[:1], (90,), workers=1)
    (row,) = table(tmp_path)
    assert row["kernel"] == "gated" and row["digest"] == digest(only.read_bytes())


def test_the_key_is_of_the_code() -> None:
    """The same code for two problems is one cubin; another GPU, type or config is another."""
    a, b = [f for f in native_cubins.forms() if f.kernel == "gated"][:2]
    wider = native_cubins.Form("gated", dataclasses.replace(a.problem, columns=1 << 21))
    assert native_cubins.key_of(a, 80) == native_cubins.key_of(wider, 80)
    assert len({native_cubins.key_of(a, 80), native_cubins.key_of(a, 90), native_cubins.key_of(b, 80)}) == 3


def test_the_command_refuses_an_unknown_gpu() -> None:
    command = [sys.executable, "-m", "optimize.kernels.native_cubins", "x", "--sm", "75"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "invalid choice" in done.stderr
