"""A record on disk: read with clear words where it is broken, written whole or not at all, and its schema as JSON.

`python -m optimize.profiles.reading` writes `profile.schema.json` anew after a change of `schema.py`.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from optimize.errors import InputError

from . import schema
from .schema import SCHEMA, Profile

RECORD = "profile.json"
DOCUMENT = Path(__file__).with_name("profile.schema.json")
MOST_WORDS = 3


def profile_from_file(path: Path | str) -> Profile:
    """Reads `profile.json`, or the one in a report's folder.

    Raises InputError where there is none, where it is broken, and where it is of another schema.
    """
    path = Path(path)
    path = path / RECORD if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise InputError(f"there is no profile at {path}", mend="`optimize profile ... --report DIR` writes one") from e
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"the profile at {path} cannot be read", got=e) from e
    except json.JSONDecodeError as e:
        raise InputError(f"{path} is no JSON", got=e, expected="a whole profile.json", mend="measure again") from e
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise InputError(
            f"{path} is no profile of this version",
            got="no schema_version" if found is None else f"schema_version {found}",
            expected=f"schema_version {SCHEMA}",
            mend="measure again, or read it with the version of optimize that wrote it",
        )
    try:
        return Profile.model_validate_json(json.dumps(data))
    except ValidationError as e:
        places = [f"{'.'.join(map(str, x['loc'])) or 'the record'}: {x['msg']}" for x in e.errors()]
        more = f" (and {len(places) - MOST_WORDS} more)" if len(places) > MOST_WORDS else ""
        raise InputError(
            f"{path} does not keep to the schema", got="; ".join(places[:MOST_WORDS]) + more, expected=DOCUMENT.name
        ) from e


def write_profile(profile: Profile, path: Path) -> Path:
    """Writes the record; a reader never sees half of it."""
    return write_whole(path, profile.model_dump_json(indent=1) + "\n")


def write_whole(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


# --- the schema ------------------------------------------------------------------------------------------------------


def schema_document() -> dict[str, Any]:
    """JSON Schema of `profile.json`: the classes' docstrings, and those of their fields, are its descriptions."""
    document = Profile.model_json_schema(mode="serialization")
    fields = field_docstrings()
    for name, part in {**document["$defs"], "Profile": document}.items():
        for field, described in part.get("properties", {}).items():
            described.pop("title", None)
            if text := fields.get((name, field)):
                described["description"] = text
        if "description" in part:
            part["description"] = inspect.cleandoc(part["description"]).replace("\n", " ")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}


def field_docstrings() -> dict[tuple[str, str], str]:
    """(class, field) -> the string that stands below the field in `schema.py`."""
    found = {}
    for cls in ast.walk(ast.parse(inspect.getsource(schema))):
        if isinstance(cls, ast.ClassDef):
            for before, after in zip(cls.body, cls.body[1:], strict=False):
                if (
                    isinstance(before, ast.AnnAssign)
                    and isinstance(before.target, ast.Name)
                    and isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                ):
                    found[cls.name, before.target.id] = inspect.cleandoc(str(after.value.value)).replace("\n", " ")
    return found


def schema_text() -> str:
    return json.dumps(schema_document(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(write_whole(DOCUMENT, schema_text()))
