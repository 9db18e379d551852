"""Every architecture exports and verifies: through the real command, at its tiny size. SUPPORT.md is this test's table.

`pytest tests/test_support.py --write-support` runs all three precisions and writes SUPPORT.md anew.
"""

from __future__ import annotations

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
LOW = ["clip-l", "vae-sd15", "dit-xl-2-256", "llama", "stylegan2", "bert-base"]
"""Architectures whose fp16 and bf16 run each time; the others' run when the table is written."""

HEAD = """# What is served

Written by `pytest tests/test_support.py --write-support`, which exports each of these at its tiny size through the command,
proves parity at three sets of sizes and verifies the bundle again; the same test checks this table each time it runs.
Errors are relative to eager fp32 (L2), the worst over outputs and sizes.

| source | component | class | varying sizes | nodes | fp32 | fp16 | bf16 |
|---|---|---|---|---|---|---|---|
"""


def rows_of(name: str, folder: Path, precisions: list[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Exports and verifies; gives (source, component) -> column -> text."""
    words = [w for p in precisions for w in ("--precision", p)]
    assert main(["export", f"arch:{name}@tiny", "--out", str(folder), *words]) == 0
    assert main(["verify", str(folder), "--json"]) == 0
    bundle = Bundle.read(folder)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for artifact in bundle.artifacts(kind="onnx"):
        record = bundle.component(artifact.component)
        assert artifact.parity is not None and artifact.parity.passed
        assert {s.name for s in artifact.parity.shapes} == {"traced", "untraced", "smallest"}
        row = rows.setdefault((name, record.name), {"class": record.class_name, "axes": ", ".join(record.axes)})
        row[str(artifact.spec["precision"])] = f"{artifact.parity.worst:.0e}"
        if artifact.spec["precision"] == "fp32":
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
        *(row.get(p, "") for p in ("fp32", "fp16", "bf16")),
    ]
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("name", NAMES)
def test_exports_and_verifies(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    write = request.config.getoption("--write-support")
    precisions = ["fp32", "fp16", "bf16"] if write or name in LOW else ["fp32"]
    rows = rows_of(name, tmp_path / "bundle", precisions)
    printed = capsys.readouterr().out
    states = json.loads(printed[printed.index("[\n") :])
    assert states and all(s["state"] == "passed" for s in states)
    if write:
        old = TABLE.read_text().splitlines() if TABLE.exists() else []
        lines = {re.match(r"\| `arch:([^`]+)` \| (\S+)", x).groups(): x for x in old if x.startswith("| `arch:")}  # type: ignore[union-attr]
        lines = {k: v for k, v in lines.items() if k[0] != name} | {k: line_of(k, r) for k, r in rows.items()}
        order = sorted(lines, key=lambda k: NAMES.index(k[0]) if k[0] in NAMES else 999)
        TABLE.write_text(HEAD + "\n".join(lines[k] for k in order) + "\n")
    table = TABLE.read_text()
    for key, row in rows.items():
        start = f"| `arch:{key[0]}` | {key[1]} | {row['class']} | {row['axes']} |"
        assert start in table, f"SUPPORT.md lacks {key}: run this file with --write-support"
