"""Every architecture exports and verifies: through the real command, at its tiny size. SUPPORT.md is this test's table.

`pytest tests/test_support.py --write-support` writes SUPPORT.md anew; `--all-precisions` runs fp16 and bf16 of all.
"""

from __future__ import annotations

import fcntl
import json
import re
from pathlib import Path

import pytest

from optimize.compile.architectures import ARCHITECTURES, PIPELINES
from optimize.compile.bundle import Bundle
from optimize.tools.cli import main

TABLE = Path(__file__).parent.parent / "SUPPORT.md"
PARTS = {key for parts in PIPELINES.values() for key in parts.values()}
SINGLE = [
    n
    for n in ARCHITECTURES
    if n not in PARTS or n in ("vae-sd15", "vae-sdxl", "vae-sd3", "vae-flux", "clip-l", "t5-xxl")
]
NAMES = [*PIPELINES, *SINGLE]
LOW = ["clip-l", "dit-xl-2-256", "llama", "stylegan2", "bert-base"]
"""Architectures whose fp16 and bf16 run each time; the others' run with --all-precisions."""

HEAD = """# What is served

Written by `pytest tests/test_support.py --write-support`, which exports each of these at its tiny size through the
command, proves parity at three sets of sizes and verifies the bundle again; the same test checks this table each time.
Errors are relative to eager fp32 (L2), the worst over outputs and sizes; an empty cell was not run for this table.

`kernels` is fp32 with `--kernels`, run by the functions' bodies; the native library passed the same gate.

| source | component | class | varying sizes | nodes | fp32 | fp16 | bf16 | kernels |
|---|---|---|---|---|---|---|---|---|
"""


def rows_of(name: str, folder: Path, precisions: list[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Exports and verifies; gives (source, component) -> column -> text."""
    words = [w for p in precisions for w in ("--precision", p)]
    assert main(["export", f"arch:{name}@tiny", "--out", str(folder), *words]) == 0
    assert main(["export", f"arch:{name}@tiny", "--out", str(folder), "--kernels"]) == 0
    assert main(["verify", str(folder), "--json"]) == 0
    bundle = Bundle.read(folder)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for artifact in bundle.artifacts(kind="onnx"):
        record = bundle.component(artifact.component)
        assert artifact.parity is not None and artifact.parity.passed
        assert {s.name for s in artifact.parity.shapes} == {"traced", "untraced", "smallest"}
        row = rows.setdefault((name, record.name), {"class": record.class_name, "axes": ", ".join(record.axes)})
        column = "kernels" if artifact.spec["kernels"] else str(artifact.spec["precision"])
        row[column] = f"{artifact.parity.worst:.0e}"
        if column == "fp32":
            row["nodes"] = str(artifact.spec["nodes"])
    return rows


def line_of(key: tuple[str, str], row: dict[str, str]) -> str:
    name, component = key
    cells = [
        f"`arch:{name}`",
        component,
        row["class"],
        row["axes"],
        row.get("nodes", ""),
        *(row.get(p, "") for p in ("fp32", "fp16", "bf16", "kernels")),
    ]
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("name", NAMES)
def test_exports_and_verifies(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    every = request.config.getoption("--all-precisions")
    precisions = ["fp32", "fp16", "bf16"] if every or name in LOW else ["fp32"]
    rows = rows_of(name, tmp_path / "bundle", precisions)
    printed = capsys.readouterr().out
    states = json.loads(printed[printed.index("[\n") :])
    assert states and all(s["state"] == "passed" for s in states)
    if request.config.getoption("--write-support"):
        write_rows(name, rows)
    table = TABLE.read_text()
    for key, row in rows.items():
        start = f"| `arch:{key[0]}` | {key[1]} | {row['class']} | {row['axes']} |"
        assert start in table, f"SUPPORT.md lacks {key}: run this file with --write-support"


def write_rows(name: str, rows: dict[tuple[str, str], dict[str, str]]) -> None:
    """Puts one source's rows into SUPPORT.md; several processes may do so at once."""
    with TABLE.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        old = file.read().splitlines()
        found = [re.match(r"\| `arch:([^`]+)` \| (\S+)", line) for line in old]
        lines = {m.groups(): line for m, line in zip(found, old, strict=True) if m and m[1] != name}
        lines |= {key: line_of(key, row) for key, row in rows.items()}
        order = sorted((k for k in lines if k[0] in NAMES), key=lambda k: NAMES.index(k[0]))
        file.truncate(0)
        file.write(HEAD + "\n".join(lines[k] for k in order) + "\n")
