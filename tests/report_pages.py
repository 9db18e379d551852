"""What several tests of the report's page need: records of two sizes and of hostile names, and a page's texts."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

from profile_records import a_breakdown, a_full_profile, a_pipeline, a_row

from optimize.profiles.schema import Profile

HOSTILE = "<script>window.pwned=1</script><img src=x onerror='window.pwned=1'>\"'</style></script>{{ 7*7 }}<!--"


def two_shapes() -> Profile:
    """Two components at two sizes, one of which has no winner."""
    rows = tuple(
        a_row(component, backend, precision, ms * factor, shape=shape, snr_db=snr)
        for shape, factor in (("512px", 1.0), ("1024px", 4.7))
        for component in ("text_encoder", "unet")
        for backend, precision, ms, snr in (
            ("eager", "fp32", 77.0, 120),
            ("torch.compile-max-autotune", "fp32", 63.0, 118),
            ("onnxruntime", "int8-weight", 31.0, 33),
        )
    )
    return a_full_profile(rows=rows, breakdowns=(a_breakdown(shape="512px"),), pipelines=(a_pipeline(shape="512px"),))


def hostile() -> Profile:
    """Every text that a record can bring, as bad as it gets."""
    data = json.loads(a_full_profile().model_dump_json())
    kept = ("state", "device", "clock", "how", "bound", "verdict", "schema_version", "key", "made")

    def spoil(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v, name) for v in value]
        spoiled = isinstance(value, str) and name not in kept
        return f"{HOSTILE} {value}" if spoiled else value

    data = spoil(data)
    data["breakdowns"][0]["trace"] = "javascript:window.pwned=1"
    return Profile.model_validate(data)


class Texts(HTMLParser):
    """The page's text by section, and every tag with its attributes; scripts and styles are no text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._section, self._raw = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag in ("script", "style"):
            self._raw = tag

    def handle_endtag(self, tag: str) -> None:
        self._raw = "" if tag == self._raw else self._raw
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if not self._raw and data.strip():
            self.sections[self._section] = self.sections.get(self._section, "") + f" {data.strip()}"
