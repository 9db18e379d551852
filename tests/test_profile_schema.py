"""The record of a profile on disk: its documented schema, and what a reader says of a broken one."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from profile_records import a_full_profile, a_profile, a_row, timing

from optimize.errors import InputError
from optimize.profiles import reading, schema
from optimize.profiles.reading import profile_from_file, write_profile


def test_the_committed_schema_is_that_of_the_records() -> None:
    assert reading.DOCUMENT.read_text(encoding="utf-8") == reading.schema_text(), "python -m optimize.profiles.reading"


def test_every_class_of_the_record_is_described_but_for_those_whose_names_say_all() -> None:
    document = reading.schema_document()
    without = {name for name, part in document["$defs"].items() if "description" not in part}
    assert without == {"Comparison", "PipelinePart"}
    assert document["$defs"]["Timing"]["properties"]["cpu_ms"]["description"].startswith("Processor time of all")
    assert "`made` is when" in document["description"]


@pytest.mark.parametrize("make", [a_profile, a_full_profile])
def test_a_record_validates_against_the_schema_and_is_read_back_whole(
    tmp_path: Path, make: Callable[[], schema.Profile]
) -> None:
    profile = make()
    path = write_profile(profile, tmp_path / "profile.json")
    document = json.loads(reading.DOCUMENT.read_text())
    jsonschema.Draft202012Validator.check_schema(document)
    data = json.loads(path.read_text())
    jsonschema.validate(data, document)
    data["rows"][0]["timing"]["median_ms"] = "fast"
    with pytest.raises(jsonschema.ValidationError, match="'fast' is not"):
        jsonschema.validate(data, document)
    assert profile_from_file(path) == profile == profile_from_file(tmp_path)  # the folder of a report will do
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]  # nothing half written is left beside it


def test_a_write_that_breaks_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_profile(a_profile(), tmp_path / "profile.json")
    before = path.read_bytes()

    def full(self: Path, text: str, **words: object) -> int:
        with self.open("w") as file:
            file.write(text[:77])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_profile(a_full_profile(), path)
    assert path.read_bytes() == before


BROKEN = {
    "absent": (None, "there is no profile at"),
    "no JSON": ("{", "is no JSON"),
    "cut": (lambda text: text[: len(text) // 2], "is no JSON"),
    "a list": ("[]", "no schema_version"),
    "another tool's": ('{"rows": []}', "no schema_version"),
    "a later one": (lambda text: text.replace('"schema_version": 1', '"schema_version": 7'), "schema_version 7"),
    "a wrong type": (lambda text: re.sub(r'"rounds": \d+', '"rounds": "many"', text), "settings.rounds: Input should"),
    "a word too many": (lambda text: text.replace('"made"', '"mad"'), "made: Field required"),
    "a figure without parity": (
        lambda text: text.replace('"passed": true', '"passed": false'),
        "a figure without a passed parity",
    ),
    "no text": (b"\xff\xfe\x00", "cannot be read"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_record_is_refused_in_words(tmp_path: Path, how: str) -> None:
    change, words = BROKEN[how]
    path = write_profile(a_profile(), tmp_path / "profile.json")
    text = change(path.read_text()) if callable(change) else change
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=re.escape(words)):
        profile_from_file(path)


def test_no_row_with_a_figure_is_built_without_parity_and_none_without_a_reason() -> None:
    with pytest.raises(ValueError, match="a figure without a passed parity"):
        a_row(parity=None)
    with pytest.raises(ValueError, match="skipped, and no reason"):
        a_row(state="skipped")
    with pytest.raises(ValueError, match="failed, and no reason"):
        a_row(state="failed", why="", timing=timing(7.0))


def test_rows_as_plain_data_and_as_a_table() -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    profile = a_profile()
    frame = profile.as_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == len(profile.rows) == 5
    assert frame.loc[frame.backend == "onnxruntime", "median_ms"].tolist() == [31.0]
    assert frame.loc[frame.state == "skipped", "median_ms"].isna().all()
    assert set(schema.flat(profile.rows[0])) == set(frame.columns)
