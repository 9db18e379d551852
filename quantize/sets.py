"""Calibration sets: a folder with one file of named feeds per sample, read one at a time, again and again.

`NNNN.safetensors` holds a sample's feeds, and what is known of it (timestep, prompt) as its metadata; `set.json` says
whose feeds these are and how they came about. A file comes whole or not at all, and `set.json` claims them last, so
that an interrupted run goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from optimize.compile.bundle import disk_errors
from optimize.compile.digests import digest_of_file
from optimize.compile.runners import Feeds
from optimize.errors import InputError

ABOUT = "set.json"
FORMAT = 1
Note = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """Where the feeds of one sample lie: a file, or with `row` that entry of a leading axis of all its arrays."""

    path: Path
    row: int | None = None
    note: Note = field(default_factory=dict)


@dataclass(frozen=True)
class CalibrationSet:
    """Samples of a component's inputs. `how` says where they come from; iterating holds one file in memory."""

    component: str
    how: str
    samples: tuple[Sample, ...]
    seed: int | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for path, samples in itertools.groupby(self.samples, key=lambda s: s.path):
            read = reader_of(path)
            for sample in samples:
                yield self._cast(read(sample.row))  # no name here: the caller alone holds it

    def _cast(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        return {n: t.to(getattr(torch, self.dtypes[n])) if n in self.dtypes else t for n, t in feeds.items()}

    @property
    def notes(self) -> tuple[Note, ...]:
        """What is known of each sample: `timestep`, `prompt`, `run`, ..., where it is."""
        return tuple(s.note for s in self.samples)

    def digest(self) -> str:
        """One digest of all samples' contents, in order. It does not depend on where they lie."""
        sha = hashlib.sha256()
        for path, samples in itertools.groupby(self.samples, key=lambda s: s.path):
            sha.update(f"{digest_of_file(path)}{[s.row for s in samples]}".encode())
        return "sha256:" + sha.hexdigest()


def reader_of(path: Path) -> Callable[[int | None], dict[str, torch.Tensor]]:
    """Gives the arrays of a file, or one row of each. Raises InputError for a file that cannot be read."""
    if path.suffix == ".npz":
        arrays = arrays_of_npz(path)
        return lambda row: {n: (t if row is None else t[row]).clone() for n, t in arrays.items()}
    return lambda row: feeds_of_safetensors(path, row)


def arrays_of_npz(path: Path) -> dict[str, torch.Tensor]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return {n: torch.from_numpy(np.array(file[n], order="C")) for n in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, AttributeError) as e:
        raise InputError(
            f"{path} is not a readable .npz of plain arrays",
            got=" ".join(str(e).split())[:300] or type(e).__name__,
            expected="what numpy.savez(FILE, name=array, ...) writes; no objects",
            mend="write it again",
        ) from e


def feeds_of_safetensors(path: Path, row: int | None) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if row is None:
                return {n: file.get_tensor(n) for n in names}
            return {n: file.get_slice(n)[row : row + 1][0] for n in names}
    except (OSError, SafetensorError) as e:
        raise InputError(
            f"{path} is not a readable safetensors file",
            got=str(e)[:300] or type(e).__name__,
            expected="named tensors",
            mend="write it again",
        ) from e


def read_set(folder: Path, component: str | None = None) -> CalibrationSet:
    """The set in a folder. Raises InputError for none, an unfinished one, and one of another component."""
    about = read_about(folder)
    if about is None:
        raise InputError(
            f"{folder} holds no calibration set",
            got=f"no {ABOUT} that can be read",
            expected="a folder that `optimize record` or a calibration wrote",
            mend="optimize record SOURCE --out DIR",
        )
    if not about.get("complete"):
        raise InputError(
            f"the calibration set in {folder} was interrupted",
            got=f"{len(sample_files(folder))} samples, unfinished",
            expected="a finished one",
            mend="the command that began it goes on where it was",
        )
    if component is not None and about["component"] != component:
        raise InputError(
            f"the calibration set in {folder} is of another component",
            got=about["component"],
            expected=component,
            mend="name the folder of this component's set, or the one above it",
        )
    samples = tuple(Sample(folder / file_name(i), None, note) for i, note in enumerate(about["notes"]))
    lost = [s.path.name for s in samples if not s.path.is_file()]
    if lost:
        raise InputError(
            f"{len(lost)} of {len(samples)} samples are missing in {folder}",
            got=f"no {lost[0]}",
            expected=f"all that {ABOUT} lists",
            mend="record the set again",
        )
    return CalibrationSet(str(about["component"]), str(about["how"]), samples, about.get("seed"))


def read_about(folder: Path) -> dict[str, Any] | None:
    """The content of `set.json`, or None where there is none of this format."""
    try:
        about = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(about, dict) and about.get("format") == FORMAT and isinstance(about.get("notes"), list)
    return about if known and {"component", "how", "key"} <= about.keys() else None


def file_name(index: int) -> str:
    return f"{index:04}.safetensors"


def sample_files(folder: Path) -> list[Path]:
    """The samples that are there, from the first on without a gap."""
    paths = (folder / file_name(i) for i in itertools.count())
    return list(itertools.takewhile(Path.is_file, paths))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Atomic: the file is the old one or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def content_digest(feeds: Feeds) -> str:
    """A digest of names, shapes and numbers."""
    sha = hashlib.sha256()
    for name in sorted(feeds):
        tensor = feeds[name].contiguous()
        sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()


class SetWriter:
    """Makes a set in `folder`, or goes on with one of the same `key`; one of another key is replaced.

    `with SetWriter(...) as writer:` add samples until `writer.full`. Where the body ends without an error the set is
    claimed; else its samples stay, and the next writer of the same key begins with them: `writer.notes`.
    """

    def __init__(
        self, folder: Path, component: str, key: Mapping[str, Any], *, total: int | None = None, seed: int | None = None
    ) -> None:
        self.folder, self.component, self.total, self.seed = folder, component, total, seed
        self.key: dict[str, Any] = json.loads(json.dumps({"component": component, **key}))
        self.how = ""
        self.notes: list[Note] = []
        self.done = False
        self._digests: set[str] = set()

    def __enter__(self) -> Self:
        with disk_errors(self.folder):
            return self._begin()

    def _begin(self) -> Self:
        about = read_about(self.folder)
        if about is None:
            check_empty(self.folder)
        elif about["key"] == self.key:
            self._go_on(about)
        else:
            clear(self.folder)
        if not self.done:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in (*self.folder.glob(".*.safetensors.*"), *self.folder.glob(f".{ABOUT}.*")):
                left.unlink()  # what a killed run was writing
            self._write_about(complete=False)
        return self

    def _go_on(self, about: Mapping[str, Any]) -> None:
        """Keeps the samples that can be read, up to the first that cannot."""
        for path in sample_files(self.folder):
            try:
                feeds, note = feeds_of_safetensors(path, None), note_of(path)
            except InputError:
                break
            self.notes.append(note)
            self._digests.add(content_digest(feeds))
        self.how = str(about["how"])
        self.done = bool(about["complete"]) and self.notes == about["notes"]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.notes:  # nothing came: no set, and no trace of one
            clear(self.folder)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        elif kind is None and not self.done:
            self._write_about(complete=True)
            self.done = True

    @property
    def full(self) -> bool:
        """Whether there is nothing to add: as many samples as asked for, or a set that was finished before."""
        return self.done or (self.total is not None and len(self.notes) >= self.total)

    def add(self, feeds: Feeds, note: Note) -> bool:
        """Writes one sample, unless the set is full or has the very same feeds already. Says whether it did."""
        from safetensors.torch import save

        digest = content_digest(feeds)
        if self.full or digest in self._digests:
            return False
        note = json.loads(json.dumps(note))
        tensors = {n: t.contiguous().clone() for n, t in feeds.items()}  # apart: safetensors takes no shared memory
        metadata = {"note": json.dumps(note)}
        path = self.folder / file_name(len(self.notes))
        with disk_errors(self.folder):
            write_whole(path, lambda partial: partial.write_bytes(save(tensors, metadata)))
        self.notes.append(note)
        self._digests.add(digest)
        return True

    def _write_about(self, *, complete: bool) -> None:
        about = {
            "format": FORMAT,
            "component": self.component,
            "how": self.how,
            "seed": self.seed,
            "complete": complete,
            "key": self.key,
            "notes": self.notes if complete else [],
        }
        text = json.dumps(about, indent=1) + "\n"
        write_whole(self.folder / ABOUT, lambda partial: partial.write_text(text))


def note_of(path: Path) -> Note:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        note = json.loads((file.metadata() or {}).get("note", "{}"))
    return note if isinstance(note, dict) else {}


def check_empty(folder: Path) -> None:
    """Raises InputError for a folder of somebody else's files."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file", expected="a new folder", mend="name another one")
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if any(not n.startswith(".") for n in found):
        raise InputError(
            f"{folder} is not empty and holds no calibration set",
            got=", ".join(found[:4]),
            expected="a new folder, or one that a calibration wrote",
            mend="name another folder",
        )


def clear(folder: Path) -> None:
    """Takes the old set away, the last sample first and its claim last: what an interrupted clearing leaves is a set
    that lacks samples, which nobody reads and the next writer clears."""
    for path in sorted(folder.glob("[0-9]*.safetensors"), reverse=True):
        path.unlink()
    (folder / ABOUT).unlink(missing_ok=True)
