"""Digests of files, remembered by path, size and time so that gigabytes are read once and not at each call."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from optimize.errors import InputError


def cache_folder() -> Path:
    """Where this product keeps what can be made again: `OPTIMIZE_CACHE`, or the user's cache folder."""
    base = (
        os.environ.get("OPTIMIZE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optimize"
    )
    return Path(base)


def digest_of_file(path: Path, *, fresh: bool = False) -> str:
    """Hex SHA-256 of a file. `fresh` reads it even where an unchanged size and time are on record."""
    try:
        stat = path.stat()
    except OSError as e:
        raise InputError(f"{path.name} cannot be read", got=str(e)) from e
    stamp = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    note = cache_folder() / "digests" / hashlib.sha256(str(stamp[0]).encode()).hexdigest()[:24]
    if not fresh:
        try:
            known = json.loads(note.read_text())
            if known["stamp"] == stamp:
                return str(known["sha256"])
        except (OSError, ValueError, KeyError):
            pass  # no note, or a broken one: the file itself decides
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if stat.st_size > 1 << 20:  # small ones are read faster than remembered
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            temporary = note.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps({"stamp": stamp, "sha256": digest}))
            temporary.replace(note)
        except OSError:
            pass  # an unwritable cache costs time, not correctness
    return digest
