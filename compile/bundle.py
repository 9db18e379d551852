"""A bundle: a folder with `manifest.json`. Files come in whole or not at all, and the manifest claims only what is there."""

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
from typing import TYPE_CHECKING, Any

from optimize.errors import GateError, InputError, MissingError

from .digests import digest_of_file

if TYPE_CHECKING:
    from .records import Artifact, ComponentRecord, Manifest
    from .spec import Component

MANIFEST = "manifest.json"
PARTIAL = ".partial"
FAILED = "failed"


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
            raise InputError(f"{root} is no bundle", got=f"no {MANIFEST}", expected="a folder that `optimize export` wrote",
                             mend=f"optimize export SOURCE --out {root}")
        try:
            content = json.loads(path.read_text())
            if isinstance(content, dict) and content.get("schema_version") != SCHEMA:
                raise InputError(f"{path} has another schema", got=content.get("schema_version"), expected=SCHEMA,
                                 mend="export again with this version")
            manifest = Manifest.model_validate(content)
        except ValidationError as e:
            first = e.errors()[0]
            raise InputError(f"{path} is not a valid manifest", got=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
                             mend="export again into a new folder") from e
        except (OSError, ValueError) as e:
            raise InputError(f"{path} cannot be read", got=str(e), expected="whole JSON",
                             mend="the file was cut or changed: export again into a new folder") from e
        return Bundle(root, manifest)

    @staticmethod
    def create(root: Path, source: str, trust: list[str]) -> Bundle:
        """A new bundle, or the one in `root` if it is of the same source. Takes the folder's lock."""
        from .records import Manifest

        if root.exists() and not root.is_dir():
            raise InputError("--out is a file", got=root, expected="a folder to write into")
        if (root / MANIFEST).exists():
            bundle = Bundle.read(root)
            if bundle.manifest.source != source:
                raise InputError(f"{root} is the bundle of another source", got=bundle.manifest.source, expected=source,
                                 mend="choose another --out")
        else:
            if root.is_dir() and any(p.name not in (PARTIAL, ".lock", FAILED) for p in root.iterdir()):
                raise InputError(f"{root} is not empty and no bundle", got=", ".join(sorted(p.name for p in root.iterdir())[:4]),
                                 expected="an empty or new folder, or a bundle to go on with", mend="choose another --out")
            bundle = Bundle(root, Manifest(source=source, trust=trust))
        with disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            bundle._take_lock()
            shutil.rmtree(root / PARTIAL, ignore_errors=True)
            bundle.save()
        return bundle

    def _take_lock(self) -> None:
        self._lock = (self.root / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise InputError(f"another process writes to {self.root}", got=str(e), mend="wait for it, or choose another --out") from e

    # --- looking ---

    def component(self, name: str) -> ComponentRecord:
        if name not in self.manifest.components:
            raise InputError(f"the bundle has no component {name}", expected="one of " + ", ".join(self.manifest.components))
        return self.manifest.components[name]

    def artifacts(self, component: str | None = None, kind: str | None = None) -> list[Artifact]:
        return [a for a in self.manifest.artifacts.values()
                if component in (None, a.component) and kind in (None, a.kind)]

    def path(self, artifact: Artifact) -> Path:
        """The artifact's file. Raises GateError where a link leads out of the bundle."""
        path = self.root / artifact.path
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise GateError(f"{artifact.path} leads out of the bundle", got=path.resolve(), expected=f"a file in {self.root}")
        return path

    def check(self, artifact: Artifact, *, fresh: bool = False) -> None:
        """The file is there and is the one that the manifest knows. Raises GateError otherwise."""
        path = self.path(artifact)
        if not path.is_file():
            raise GateError(f"{artifact.path} is missing", mend="run the same `optimize export` again: it makes what is missing")
        size = path.stat().st_size
        if size != artifact.bytes:
            raise GateError(f"{artifact.path} was cut or changed", got=f"{size} bytes", expected=f"{artifact.bytes} bytes",
                            mend="run the same `optimize export` again")
        digest = digest_of_file(path, fresh=fresh)
        if digest != artifact.sha256:
            raise GateError(f"{artifact.path} is not the file that was proved", got=f"sha256 {digest}",
                            expected=f"sha256 {artifact.sha256}", mend="run the same `optimize export` again")

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
        """Moves a finished file to its place, durably."""
        target = self.root / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        file.replace(target)
        return target

    def record(self, *artifacts: Artifact, component: Component | None = None) -> None:
        """Claims artifacts, all in one write of the manifest."""
        new = self.manifest.artifacts | {a.id: a for a in artifacts}
        components = dict(self.manifest.components)
        if component is not None:
            components[component.name] = record_of(component)
        self.manifest = self.manifest.model_copy(update={"artifacts": new, "components": components})
        self.save()

    def save(self) -> None:
        temporary = self.root / f"{MANIFEST}.{os.getpid()}"
        with temporary.open("w") as file:
            file.write(self.manifest.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.root / MANIFEST)


def record_of(component: Component) -> ComponentRecord:
    from .records import AxisRecord, ComponentRecord, TensorRecord

    return ComponentRecord(
        name=component.name, role=component.role, class_name=component.class_name,
        axes={n: AxisRecord(min=a.min, opt=a.opt, max=a.max, step=a.step) for n, a in component.axes.items()},
        inputs=[TensorRecord(name=t.name, dtype=t.dtype, shape=list(t.shape), fill=t.fill) for t in component.inputs],
        outputs=list(component.outputs),
    )


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turns the system's answers about the output folder into ours."""
    try:
        yield
    except PermissionError as e:
        raise InputError(f"{root} cannot be written", got=str(e), mend="choose another --out, or change its rights") from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MissingError(f"no space left for {root}", got=str(e), mend="free some, or choose another --out") from e
        if e.errno in (errno.EROFS, errno.ENOTDIR):
            raise InputError(f"{root} cannot be written", got=str(e), mend="choose another --out") from e
        raise
