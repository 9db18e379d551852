"""The report of a profile: its record as JSON, and one page that shows it and needs nothing else, no network either.

What a section shows is made in the `report_*` modules, how it looks in `report_page/`. Text of a record is somebody
else's: templates escape it, figures are escaped where they are made, and the page's policy lets no request out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.errors import MissingError
from optimize.profiles.reading import RECORD, write_profile, write_whole
from optimize.profiles.schema import Profile

from . import report_facts, report_time, report_views
from .report_views import View, shape_pills, slug
from .report_words import OTHER_COLOUR, SYMBOLS, colour_of

PAGE = "report.html"
TEMPLATES = Path(__file__).parent / "report_page"


@dataclass(frozen=True)
class Section:
    """`name` is its template and its anchor; `view` gives what that shows, or None where the record has nothing."""

    name: str
    title: str
    view: Callable[[Profile], View | None]


SECTIONS = (
    Section("answer", "The answer", report_views.answer),
    Section("notes", "Before you believe it", report_views.notes),
    Section("latency", "Latency", report_views.latency),
    Section("pareto", "Latency and quality", report_views.pareto),
    Section("roofline", "Roofline", report_views.roofline),
    Section("pipelines", "Time per image", report_time.pipelines),
    Section("breakdowns", "Where the time goes", report_time.breakdowns),
    Section("preparation", "Before the first result", report_time.preparation),
    Section("memory", "Memory", report_time.memory),
    Section("comparison", "Against an older record", report_time.comparison),
    Section("estimates", "Estimates, not measured", report_time.estimates),
    Section("table", "Every row", report_facts.table),
    Section("environment", "Where it was measured", report_facts.environment),
    Section("method", "How it was measured", report_facts.method),
    Section("reproduce", "Measure it again", report_facts.reproduce),
)


def write_report(profile: Profile, folder: Path | str) -> Path:
    """Writes `profile.json` and `report.html` into the folder; gives the page.

    Raises MissingError without plotly and jinja2, after the record has been written: what was measured is kept.
    """
    folder = Path(folder)
    write_profile(profile, folder / RECORD)
    return write_whole(folder / PAGE, page_of(profile))


def page_of(profile: Profile) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as e:
        raise MissingError(
            "the report's page is made by plotly and jinja2", got=e, mend='pip install "optimize[profile]"'
        ) from e
    shown = [(s, view) for s in SECTIONS if (view := s.view(profile)) is not None]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["slug"] = slug
    figures = figures_in([view for _, view in shown])
    return environment.get_template("page.html").render(
        profile=profile,
        sections=[{"name": s.name, "title": s.title, "view": view} for s, view in shown],
        shapes=shape_pills(profile),
        legend=legend_of(profile),
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs() if figures else "",
        figures=json_in_html(figures),
    )


def figures_in(value: Any) -> dict[str, Any]:
    """Every plotly figure of the views by the id of its place."""
    if isinstance(value, dict):
        own = {value["id"]: value["figure"]} if "figure" in value else {}
        return own | figures_in(list(value.values()))
    if isinstance(value, list):
        return {k: v for item in value for k, v in figures_in(item).items()}
    return {}


def json_in_html(value: Any) -> str:
    """JSON that no text in it can leave: `</script>` and `<!--` are nothing but a string's characters."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def legend_of(profile: Profile) -> dict[str, Any]:
    """Backends with their colours and precisions with their marks, those of the record alone."""
    timed = [r for r in profile.rows if r.timing]
    backends = dict.fromkeys(r.backend for r in timed)
    precisions = dict.fromkeys(r.precision for r in timed)
    marks = {"circle": "●", "square": "■", "diamond": "◆", "star": "★", "triangle-up": "▲", "triangle-right": "▶",
             "triangle-left": "◀", "triangle-down": "▼", "circle-dot": "◉"}  # fmt: skip
    return {
        "backends": {b: colour_of(b) for b in backends} or {"": OTHER_COLOUR},
        "precisions": {p: marks.get(SYMBOLS.get(p, ""), "✚") for p in precisions},
    }
