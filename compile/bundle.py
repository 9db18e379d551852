"""A bundle: a folder with `manifest.json`. Files come in whole or not at all, and it claims only what is there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from optimize.errors import GateError, InputError, MissingError

from .digests import digest_of_file

if TYPE_CHECKING:
    from .records import Artifact, ComponentRecord, Manifest
    from .spec import Component

MANIFEST = "manifest.json"
LOCK = ".lock"
PARTIAL = ".partial"
FAILED = "failed"
LEFT_BEHIND = (LOCK, PARTIAL, FAILED, f".{MANIFEST}.")
"""What a killed run can leave beside the artifacts: names in the folder begin so."""


@dataclass
class Bundle:
    """`root` is the folder. Read with `Bundle.read`, made or continued with `Bundle.create`."""

    root: Path
    manifest: Manifest
    _lock: Any = field(default=None, repr=False)

    # --- reading and making ---

    @staticmethod
    def read(root: Path) -> Bundle:
        """Reads a bundle. Raises InputError for a folder that is none and for a broken manifest."""
        from pydantic import ValidationError

        from .records import SCHEMA, Manifest

        path = root / MANIFEST
        if not path.is_file():
            raise InputError(
                f"{root} is no bundle",
                got=f"no {MANIFEST}",
                expected="a folder that `optimize export` wrote",
                mend=f"optimize export SOURCE --out {root}",
            )
        try:
            content = json.loads(path.read_text())
            if isinstance(content, dict) and content.get("schema_version") != SCHEMA:
                raise InputError(
                    f"{path} has another schema",
                    got=content.get("schema_version", "none"),
                    expected=SCHEMA,
                    mend="export again with this version",
                )
            manifest = Manifest.model_validate(content)
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{path} is not a valid manifest",
                got=f"{where}: {first['msg']}" if where else first["msg"],
                expected="what `optimize export` wrote",
                mend="export again into a new folder",
            ) from e
        except (OSError, ValueError) as e:
            raise InputError(
                f"{path} cannot be read",
                got=str(e),
                expected="whole JSON",
                mend="the file was cut or changed: export again into a new folder",
            ) from e
        return Bundle(root, manifest)

    @staticmethod
    def look(root: Path, source: str) -> Bundle | None:
        """The bundle in `root` that an export of `source` goes on with; None where a new one fits. Writes nothing.

        A bundle that claims nothing yet can become that of any source. Raises InputError for every other folder.
        """
        with disk_errors(root):
            if root.exists() and not root.is_dir():
                raise InputError(
                    "--out is a file", got=root, expected="a folder to write into", mend="choose another --out"
                )
            if (root / MANIFEST).exists():
                bundle = Bundle.read(root)
                if bundle.manifest.source == source:
                    return bundle
                if bundle.manifest.artifacts:
                    raise InputError(
                        f"{root} is the bundle of another source",
                        got=bundle.manifest.source,
                        expected=source,
                        mend="choose another --out",
                    )
                return None
            names = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
            if any(not name.startswith(LEFT_BEHIND) for name in names):
                raise InputError(
                    f"{root} is not empty and no bundle",
                    got=", ".join(names[:4]),
                    expected="an empty or new folder, or a bundle to go on with",
                    mend="choose another --out",
                )
            return None

    @staticmethod
    def create(root: Path, source: str, trust: list[str]) -> Bundle:
        """A new bundle, or the one in `root` if it is of the same source. Takes the folder's lock until `close`."""
        from .records import Manifest

        Bundle.look(root, source)  # where this raises, nothing has been written
        with disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            lock = take_lock(root)
            # looked at anew: whoever had the lock until now may have recorded more
            bundle = Bundle.look(root, source) or Bundle(root, Manifest(source=source))
            bundle._lock = lock
            trusted = sorted({*bundle.manifest.trust, *trust})
            bundle.manifest = bundle.manifest.model_copy(update={"trust": trusted})
            shutil.rmtree(root / PARTIAL, ignore_errors=True)
            for stale in root.glob(f".{MANIFEST}.*"):
                stale.unlink()
            try:
                bundle.save()
            except BaseException:
                bundle.close()
                raise
        return bundle

    def close(self) -> None:
        """Gives the lock back. A bundle that never came to claim anything leaves no folder that looks like one."""
        if self._lock is None:
            return
        names = [p.name for p in self.root.iterdir()] if self.root.is_dir() else []
        if not self.manifest.artifacts and all(name.startswith((MANIFEST, *LEFT_BEHIND)) for name in names):
            with contextlib.suppress(OSError):
                (self.root / MANIFEST).unlink(missing_ok=True)
                (self.root / LOCK).unlink()
                self.root.rmdir()
        self._lock.close()
        self._lock = None

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- looking ---

    def component(self, name: str) -> ComponentRecord:
        if name not in self.manifest.components:
            raise InputError(
                f"the bundle has no component {name}",
                got=", ".join(self.manifest.components) or "none",
                expected="one of these",
                mend=f"optimize export {self.manifest.source} --component {name}",
            )
        return self.manifest.components[name]

    def artifacts(self, component: str | None = None, kind: str | None = None) -> list[Artifact]:
        return [
            a for a in self.manifest.artifacts.values() if component in (None, a.component) and kind in (None, a.kind)
        ]

    def path(self, artifact: Artifact) -> Path:
        """The artifact's file. Raises GateError where a link leads out of the bundle."""
        path = self.root / artifact.path
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise GateError(
                f"{artifact.path} leads out of the bundle", got=path.resolve(), expected=f"a file in {self.root}"
            )
        return path

    def check(self, artifact: Artifact, *, fresh: bool = False) -> None:
        """The file is there and is the one that the manifest knows. Raises GateError otherwise."""
        path = self.path(artifact)
        if not path.is_file():
            raise GateError(
                f"{artifact.path} is missing", mend="run the same `optimize export` again: it makes what is missing"
            )
        size = path.stat().st_size
        if size != artifact.bytes:
            raise GateError(
                f"{artifact.path} was cut or changed",
                got=f"{size} bytes",
                expected=f"{artifact.bytes} bytes",
                mend="run the same `optimize export` again",
            )
        digest = digest_of_file(path, fresh=fresh)
        if digest != artifact.sha256:
            raise GateError(
                f"{artifact.path} is not the file that was proved",
                got=f"sha256 {digest}",
                expected=f"sha256 {artifact.sha256}",
                mend="run the same `optimize export` again",
            )
        if artifact.kind == "onnx":
            self._check_references(artifact)

    def _check_references(self, artifact: Artifact) -> None:
        """The graph reads its weights from the files that it was proved with, and from no others."""
        import onnx
        from onnx.external_data_helper import _get_all_tensors, uses_external_data

        path = self.path(artifact)
        known = [self.manifest.artifacts[p] for p in artifact.parents if p in self.manifest.artifacts]
        allowed = {p.name for p in map(self.path, known) if p.parent == path.parent}
        for tensor in filter(uses_external_data, _get_all_tensors(onnx.load(path, load_external_data=False))):
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            if location not in allowed:
                raise GateError(
                    f"{artifact.path} takes weights from a file that is no part of it",
                    got=f"{tensor.name}: {location}",
                    expected=", ".join(sorted(allowed)) or "none",
                    mend="export again into a new folder",
                )

    def whole(self, artifact: Artifact) -> bool:
        try:
            self.check(artifact)
        except GateError:
            return False
        return True

    # --- writing ---

    @contextlib.contextmanager
    def workspace(self, name: str) -> Iterator[Path]:
        """A folder for files in the making, on the same file system; gone afterwards."""
        folder = self.root / PARTIAL / name.replace("/", "_")
        with disk_errors(self.root):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    (self.root / PARTIAL).rmdir()

    def adopt(self, file: Path, relative: str) -> Path:
        """Moves a finished file to its place, durably. The claims of what it takes the place of are withdrawn first."""
        target = self.root / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(self.root.resolve()):
            raise InputError(
                f"{relative} leads out of the bundle",
                got=target.parent.resolve(),
                expected=f"a folder in {self.root}",
                mend="remove the link, or choose another --out",
            )
        self._withdraw(relative, file)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        file.replace(target)
        return target

    def _withdraw(self, relative: str, file: Path) -> None:
        """The manifest forgets the artifact at `relative`, unless `file` equals it, and all that was made of it."""
        known = self.manifest.artifacts
        old = {i for i, a in known.items() if a.path == relative}
        size = file.stat().st_size
        if all(known[i].bytes == size and known[i].sha256 == digest_of_file(file) for i in old):
            return
        gone = set(old)
        while more := {i for i, a in known.items() if i not in gone and gone.intersection(a.parents)}:
            gone |= more
        left = {i: a for i, a in known.items() if i not in gone}
        self.manifest = self.manifest.model_copy(update={"artifacts": left})
        self.save()
        for id_ in gone - old:
            self.path(known[id_]).unlink(missing_ok=True)

    def record(self, *artifacts: Artifact, component: Component | None = None) -> None:
        """Claims artifacts, all in one write of the manifest."""
        new = self.manifest.artifacts | {a.id: a for a in artifacts}
        components = dict(self.manifest.components)
        if component is not None:
            components[component.name] = record_of(component)
        self.manifest = self.manifest.model_copy(update={"artifacts": new, "components": components})
        self.save()

    def save(self) -> None:
        temporary = self.root / f".{MANIFEST}.{os.getpid()}"
        with disk_errors(self.root):
            try:
                with temporary.open("w") as file:
                    file.write(self.manifest.model_dump_json(indent=1) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.root / MANIFEST)
            finally:
                temporary.unlink(missing_ok=True)


def take_lock(root: Path) -> IO[str]:
    """The folder's lock, free again when the file is closed or the process ends. InputError: somebody has it."""
    while True:
        file = (root / LOCK).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.close()
            raise InputError(
                f"another process writes to {root}",
                got=str(e),
                expected="one at a time",
                mend="wait for it, or choose another --out",
            ) from e
        with contextlib.suppress(FileNotFoundError):  # its last holder may have taken the file away
            if (root / LOCK).stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()


def record_of(component: Component) -> ComponentRecord:
    from .records import AxisRecord, ComponentRecord, TensorRecord

    return ComponentRecord(
        name=component.name,
        role=component.role,
        class_name=component.class_name,
        axes={n: AxisRecord(min=a.min, opt=a.opt, max=a.max, step=a.step) for n, a in component.axes.items()},
        inputs=[TensorRecord(name=t.name, dtype=t.dtype, shape=list(t.shape), fill=t.fill) for t in component.inputs],
        outputs=list(component.outputs),
    )


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `folder` for what is thrown away again: tensors are large, and /tmp may be memory. What killed
    processes left goes, too."""
    import tempfile

    import psutil

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{prefix}*"):
            if not psutil.pid_exists(int(left.name.removeprefix(prefix).partition("-")[0])):
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{prefix}{os.getpid()}-") as made:
            yield Path(made)


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turns the system's answers about the output folder into ours; what it says of other files passes through."""
    try:
        yield
    except OSError as e:
        if e.errno in NO_SPACE:
            raise MissingError(
                f"no space left for {root}",
                got=str(e),
                expected="room on the disk, in the quota and below `ulimit -f`",
                mend="free some, or choose another --out; what was finished is kept",
            ) from e
        here = Path.cwd() / root
        about = Path.cwd() / os.fsdecode(e.filename) if isinstance(e.filename, str | bytes) else here
        if e.errno is None or not (about.is_relative_to(here) or here.is_relative_to(about)):
            raise
        raise InputError(
            f"{root} cannot be written",
            got=str(e),
            expected="a folder that can be made and written to",
            mend="choose another --out, or change its rights",
        ) from e
