"""A plan: which artifact of a bundle runs on which backend, as a profile chose it.

`optimize.load(DIR, plan=...)` deploys it, and refuses what is not there any more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from optimize.compile.records import Record
from optimize.errors import InputError

from .reading import profile_from_file, write_whole
from .schema import Profile

SCHEMA = 1


class Part(Record):
    """`artifact` is None where the backend runs the source's own module; `sha256` is of the artifact's file."""

    backend: str
    precision: str
    artifact: str | None = None
    sha256: str | None = None
    why: str = ""


class Plan(Record):
    """`machine` is the key of the machine that it was measured on, `device` its kind."""

    schema_version: int = SCHEMA
    source: str
    made: str
    device: str
    machine: str
    threads: int = 0
    wishes: tuple[str, ...] = ()
    met: bool
    parts: dict[str, Part]


def plan_of(profile: Profile) -> Plan:
    """The profile's answer as a plan. Raises InputError where it has none."""
    choice = profile.choice
    if choice is None or not choice.picks:
        raise InputError("the profile has no answer to make a plan of", expected="a component that could be measured")
    rows = {(r.component, r.shape, r.backend, r.precision): r for r in profile.rows}
    parts = {
        p.component: Part(
            backend=p.backend,
            precision=p.precision,
            artifact=p.artifact,
            sha256=rows[p.component, p.shape, p.backend, p.precision].sha256,
            why=p.why,
        )
        for p in choice.picks
    }
    machine = profile.machine
    return Plan(
        source=profile.source,
        made=profile.made,
        device=machine.device,
        machine=machine.key,
        threads=machine.threads if machine.device == "cpu" and machine.threads != machine.cores else 0,
        wishes=tuple(choice.wishes),
        met=choice.met,
        parts=parts,
    )


def write_plan(profile: Profile, path: Path) -> Path:
    return write_whole(path, plan_of(profile).model_dump_json(indent=1) + "\n")


def plan_from(what: Any) -> Plan:
    """A plan, a profile, or the path of either's file. Raises InputError for anything else."""
    if isinstance(what, Plan):
        return what
    if isinstance(what, Profile):
        return plan_of(what)
    expected = "a file that `optimize profile --plan FILE` wrote"
    if not isinstance(what, str | Path):
        raise InputError("this is no plan", got=type(what).__name__, expected=f"a record of a profile, or {expected}")
    path = Path(what)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is no plan", got=e, expected=expected, mend="write it anew") from e
    if isinstance(data, dict) and "rows" in data:
        return plan_of(profile_from_file(path))
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise InputError(
            f"{path} is no plan of this version",
            got="no schema_version" if found is None else f"schema_version {found}",
            expected=f"{expected}, of schema_version {SCHEMA}",
            mend="write it anew",
        )
    try:
        return Plan.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path} is no plan", got=f"{where}: {first['msg']}", expected=expected) from e
