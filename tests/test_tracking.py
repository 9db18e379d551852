"""Weights & Biases, offline: what `--log wandb` writes, and that nothing goes anywhere unasked."""

import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from profile_records import a_full_profile, a_profile

from optimize.errors import MissingError
from optimize.tools import tracking
from optimize.tools.report import write_report

wandb = pytest.importorskip("wandb", reason="needs wandb")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def records_of(run: Path) -> list[Any]:
    """What is in an offline run's file, the very records that `wandb sync` would send.

    The file is LevelDB's log: blocks of 32 KiB with pieces of records, each after its checksum, length and kind.
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("*.wandb")
    data, at, found, held = file.read_bytes(), 7, [], b""  # 7 bytes name the format
    assert data[:4] in (b":W&B", b"")
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        piece, at = data[at + 7 : at + 7 + length], at + 7 + length
        if len(piece) < length:  # not written to its end yet
            break
        held = held + piece if kind in (3, 4) else piece  # whole, first, middle, last
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(held))
    return found


def test_a_profile_is_logged_offline(offline: Path) -> None:
    profile = a_full_profile()
    folder = offline / "r"
    page = write_report(profile, folder)
    where = Path(tracking.log_to_wandb(profile, folder))
    assert where.parent == folder / "wandb" and where.name.startswith("offline-run-")
    kept, end = records_of(where), time.monotonic() + 60
    while not any(r.HasField("exit") for r in kept) and time.monotonic() < end:
        time.sleep(0.1)  # wandb's own process writes on after `finish`
        kept = records_of(where)
    config = {i.key: json.loads(i.value_json) for r in kept for i in (*r.run.config.update, *r.config.update) if i.key}
    assert config["machine"]["cpu"] == profile.machine.cpu and config["settings"]["rounds"] == 7
    assert config["wishes"] == ["p95<100ms", "cosine>=0.999"]
    summary = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for r in kept for i in r.summary.update}
    assert summary["unet/default/torch.compile/fp32/median_ms"] == 63.0
    assert summary["unet/default/fastest"] == summary["unet/default/picked"] == "onnxruntime int8"
    assert "unet/default/aoti/fp32/median_ms" not in summary  # inconclusive
    assert summary["rows/inconclusive"] == summary["rows/skipped"] == 1 and summary["busy"] is True
    assert not [k for k in summary if "rtx-4090" in k]  # an estimate is no figure
    names = {a.path for r in kept for a in r.artifact.manifest.contents}
    assert names >= {"profile.json", "report.html"}
    logged = next((where / "files" / "media" / "html").glob("report*.html"))
    assert logged.read_bytes() == page.read_bytes()
    table = json.loads(next((where / "files" / "media" / "table").glob("rows*.json")).read_text())
    cells = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [c["state"] for c in cells] == [r.state for r in profile.rows]
    assert cells[2]["median_ms"] == 31.0 and cells[4]["median_ms"] is None


def test_the_report_is_written_where_there_is_none(offline: Path) -> None:
    tracking.log_to_wandb(a_profile(), offline / "new")
    assert {p.name for p in (offline / "new").iterdir()} == {"wandb", "profile.json", "report.html"}


def test_without_wandb_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingError, match=r"needs wandb(.|\n)*pip install \"optimize\[wandb\]\""):
        tracking.log_to_wandb(a_profile(), tmp_path)


HERE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from profile_records import a_profile; "


def test_without_a_key_it_says_so_and_waits_for_nobody(offline: Path) -> None:
    """In a process of its own: wandb keeps the settings of the first run."""
    code = HERE + "from optimize.tools.tracking import log_to_wandb; log_to_wandb(a_profile(), sys.argv[1])"
    words = [sys.executable, "-c", code, str(offline)]
    nobody = {**os.environ, "WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(words, env=nobody, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert re.search(r"MissingError: wandb is not logged in(.|\n)*WANDB_MODE=offline", done.stderr), done.stderr
    assert (offline / "profile.json").is_file()  # what was measured is kept


def test_a_report_alone_never_imports_wandb(tmp_path: Path) -> None:
    code = HERE + (
        "from optimize.tools.report import write_report; import optimize.tools.tracking; "
        "write_report(a_profile(), sys.argv[1]); sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
