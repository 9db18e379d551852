"""A profile's record on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimize.profiles.schema import Profile

RECORD = "profile.json"


def write_record(record: Profile, folder: Path | None) -> Path | None:
    """`folder/profile.json`, whole or not at all; nothing where there is no folder."""
    from optimize.compile.bundle import disk_errors

    if folder is None:
        return None
    path = folder / RECORD
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{RECORD}.{os.getpid()}")
        try:
            temporary.write_text(record.model_dump_json(indent=1) + "\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path
