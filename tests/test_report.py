"""The report of a profile: what its page says, what its figures hold, and the terminal's tables."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_records import (
    SETTINGS,
    a_breakdown,
    a_full_profile,
    a_pipeline,
    a_profile,
    a_row,
)
from report_pages import Texts, two_shapes

from optimize.errors import MissingError
from optimize.profiles.reading import profile_from_file
from optimize.profiles.schema import Choice, Gpu, Load, OperatorTime, Pick, Profile
from optimize.tools import report, report_charts, report_modules, report_time, report_views, report_words
from optimize.tools.profile_tables import show_profile
from optimize.tools.report import page_of, write_report

go = pytest.importorskip("plotly.graph_objects", reason="needs plotly")
pytest.importorskip("jinja2", reason="needs jinja2")

# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_record_and_the_page(tmp_path: Path) -> None:
    profile = a_full_profile()
    page = write_report(profile, tmp_path / "new" / "r")
    assert sorted(p.name for p in page.parent.iterdir()) == ["profile.json", "report.html"]
    assert profile_from_file(page.parent) == profile
    assert page.stat().st_size < 5_500_000


def test_a_full_record_has_every_section_and_a_bare_one_few() -> None:
    full = Texts(page_of(a_full_profile()))
    assert [s for s in full.sections if s] == [s.name for s in report.SECTIONS]
    bare = Profile(**{**a_profile().model_dump(), "rows": (), "limits": None, "command": ""})
    page = page_of(bare)
    assert set(Texts(page).sections) - {""} == {"environment", "method"}
    assert len(page) < 60_000  # no figure, no plotly


def test_the_answer_says_what_to_deploy_how_fast_and_what_it_costs() -> None:
    said = Texts(page_of(a_full_profile())).sections["answer"]
    for words in (
        "Every wish is met", "p95<100ms", "cosine>=0.999", "unet", "onnxruntime", "int8", "31.0 ms",
        "2.48x faster than eager fp32", "cosine 0.999750", "217 MiB", "the fastest that meets every wish",
        "Next: torch.compile fp32, 63.0 ms", "294 ms", "0.77 EUR", "4,599.00 EUR", "7 images a second on 3 machines",
    ):  # fmt: skip
        assert words in said, words
    unmet = Choice(wishes=["p95<7ms"], met=False, missed=("p95 is 33 ms, 26 ms too much",), picks=[], front={})
    said = Texts(page_of(a_profile(choice=unmet))).sections["answer"]
    assert "Nobody meets every wish" in said and "26 ms too much" in said and "is met" not in said


def test_without_wishes_the_fastest_is_named_an_inconclusive_one_by_its_slow_rounds() -> None:
    rows = (
        a_row(ms=77.0),
        a_row(backend="aoti", ms=7.0, state="inconclusive"),
        a_row(backend="torch.compile", ms=63.0),
    )
    assert rows[1].timing is not None
    slow = rows[1].timing.model_copy(update={"rounds_ms": [1.0, 77.0, 77.7]})
    rows = (rows[0], rows[1].model_copy(update={"timing": slow}), rows[2])
    (card,) = report_views.answer(a_profile(rows=rows))["cards"]
    assert (card["backend"], card["runner_up"]) == ("torch.compile", "eager fp32, 77.0 ms")
    bars = report_views.latency(a_profile(rows=rows))["charts"][0]["bars"]
    assert [(b["backend"], b["wins"], b["unsure"]) for b in bars] == [
        ("aoti", False, True),
        ("torch.compile", True, False),
        ("eager", False, False),
    ]
    assert "No choice was asked for" in Texts(page_of(a_profile(rows=rows))).sections["answer"]


def test_what_failed_is_listed_with_its_reason_and_a_busy_machine_is_told_first() -> None:
    gone = a_row(backend="aoti", state="failed", why="out of memory: 63 GiB asked for")
    base = a_profile()
    page = Texts(page_of(a_profile(rows=(*base.rows, gone), load=Load(seconds=7, others=0.63, stolen=0.07, busy=True))))
    assert "out of memory: 63 GiB asked for" in page.sections["latency"]
    assert "tensorrt does not run on cpu" in page.sections["latency"]
    notes = page.sections["notes"]
    assert notes.index("The machine was busy") < notes.index("1 of 6 inconclusive") < notes.index("1 failed")
    assert "63 %" in notes and "7 %" in notes
    calm = Texts(page_of(a_profile(rows=(a_row(),))))
    assert "notes" not in calm.sections


def test_bars_are_as_long_as_their_figures() -> None:
    (chart,) = report_views.latency(a_profile())["charts"]
    rows = {r.backend: r for r in a_profile().rows if r.timing}
    most = max(r.timing.p90_ms for r in rows.values() if r.timing)
    for bar in chart["bars"]:
        t = rows[bar["backend"]].timing
        assert t is not None
        assert (bar["low"], bar["width"], bar["high"]) == pytest.approx(
            (100 * t.p10_ms / most, 100 * t.median_ms / most, 100 * t.p90_ms / most), abs=0.01
        )
    (image,) = report_time.pipelines(a_profile(pipelines=(a_pipeline(),)))["charts"]
    (bar,) = image["bars"]
    assert sum(p["width"] for p in bar["pieces"]) == pytest.approx(100 / 1.03, abs=0.01)
    assert bar["measured"]["width"] == 100 and "(+3.0%)" in bar["measured"]["text"]


def test_estimates_stand_apart_in_words_and_in_place() -> None:
    page = Texts(page_of(a_full_profile()))
    assert "not measured" in page.sections["estimates"] and "≈ 0.770 ms" in page.sections["estimates"]
    assert [name for name, said in page.sections.items() if "rtx-4090" in said] == ["estimates"]
    assert "rtx-4090" not in json.dumps(report.figures_in([s.view(a_full_profile()) for s in report.SECTIONS]))


def test_environment_and_method_are_told() -> None:
    gpu = Gpu(name="A GPU of a test", sm=89, memory_bytes=24 << 30, driver="570.7", power_limit_w=77, clock_sm_mhz=2520)
    base = a_full_profile()
    page = Texts(page_of(base.model_copy(update={"machine": base.machine.model_copy(update={"gpu": gpu})})))
    for words in ("A GPU of a test", "77.0 W", "2520 MHz", "570.7", "torch 2.13.0", "0123abc", "peak int8 370 GFLOP/s"):
        assert words in page.sections["environment"], words
    for words in (f"{SETTINGS.rounds}, over all candidates", "within 5 %", "at most 10 %", "seed 1", "a rule"):
        assert words in page.sections["method"], words
    assert "optimize profile demo --report r" in page.sections["reproduce"]
    assert "21.0 ms 31.0 ms +47.6%" in page.sections["comparison"]
    order = re.findall("slower|faster|same", page.sections["comparison"].partition("why")[2])
    assert order == ["slower", "faster", "same"]


def test_a_backend_has_one_colour_everywhere() -> None:
    profile = a_full_profile()
    (_, _, pareto), *_ = report_charts.pareto_figures(profile)
    (_, _, roof), *_ = report_charts.roofline_figures(profile)
    for row in profile.rows:
        if row.timing:
            colour = report_words.colour_of(row.backend)
            assert colour in {t["marker"]["color"] for t in pareto["data"] if "marker" in t}
            assert colour in {t["marker"]["color"] for t in roof["data"] if "marker" in t}
    shown = [b for c in report_time.memory(profile)["charts"] for b in c["bars"]]
    assert all(b["colour"] == report_words.colour_of(b["backend"]) for b in shown)
    from optimize.compile.backends import BACKENDS

    assert set(report_words.BACKEND_COLOURS) == set(BACKENDS)
    assert len(set(report_words.BACKEND_COLOURS.values())) == len(BACKENDS)


def test_without_plotly_the_record_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingError, match=r'pip install "optimize\[profile\]"'):
        write_report(a_profile(), tmp_path)
    assert profile_from_file(tmp_path) == a_profile()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (report_words.number(0.96), "0.960"), (report_words.number(0.0123), "0.0123"),
        (report_words.number(12.34), "12.3"), (report_words.number(1234.5), "1234"),
        (report_words.number(7e-5), "7.00e-05"),
        (report_words.milliseconds(0.063), "63.0 µs"), (report_words.milliseconds(7777), "7.78 s"),
        (report_words.size(63 << 20), "63.0 MiB"), (report_words.percent(0.000377), "0 %"),
        (report_words.percent(0.0584), "5.8 %"), (report_words.percent(0.6), "60 %"),
        (report_words.cosine(1 - 1e-15), "1"), (report_words.cosine(0.9995474), "0.999547"),
        (report_words.cosine(0.77), "0.7700"),
        (report_words.money(0.0226, "EUR"), "0.023 EUR"), (report_words.money(4599, ""), "4,599.00"),
        (report_words.times(0.25), "4.00x"), (report_words.decibels(200), "exact"),
    ],
)  # fmt: skip
def test_figures_in_words(said: str, words: str) -> None:
    assert said == words


def test_a_pick_is_shown_with_the_figures_of_the_row_it_has() -> None:
    """A pipeline that guides calls its denoiser with a doubled batch: the pick has that row's latency."""
    guided = a_row(backend="aoti", ms=63.0, eager_ms=630.0, shape="default+guided", snr_db=77.0)
    rows = (a_row(), a_row(backend="aoti", ms=31.0), guided)
    pick = Pick(component="unet", shape="default", backend="aoti", precision="fp32", latency_ms=63.0, why="as called")
    choice = Choice(wishes=[], met=True, picks=[pick], front={})
    (card,) = report_views.answer(a_profile(rows=rows, choice=choice))["cards"]
    assert (card["measured_at"], card["speed"]) == ("default+guided", "10.0x faster than eager fp32")


def test_a_pick_without_its_row_is_shown_all_the_same() -> None:
    pick = Pick(component="gone", shape="s", backend="aoti", precision="fp32", latency_ms=7.0, why="of another record")
    choice = Choice(wishes=[], met=True, picks=[pick], front={})
    assert "of another record" in Texts(page_of(a_profile(choice=choice))).sections["answer"]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_plotly_takes_every_figure() -> None:
    figures = report.figures_in([s.view(two_shapes()) for s in report.SECTIONS])
    assert {name.split("-")[0] for name in figures} == {"pareto", "roofline", "modules"}
    for figure in figures.values():
        data = json.loads(json.dumps(figure).replace('"mixed"', '"#777777"'))  # the page's own colour
        go.Figure(data)  # raises on a name or a value that plotly does not know


def test_the_front_is_joined_and_the_pick_is_marked() -> None:
    ((_, _, figure),) = report_charts.pareto_figures(a_full_profile())
    line, *points = figure["data"]
    assert (line["x"], line["y"]) == ([31.0, 63.0], [33.0, 100.0])  # eager is beaten, aoti inconclusive, 120 dB capped
    starred = [p["text"] for p in points if "★" in p["text"][0]]
    assert starred == [["onnxruntime int8 ★"]]
    assert [p["marker"]["symbol"] for p in points] == ["triangle-up", "circle-open", "circle", "circle"]


@given(st.lists(st.tuples(st.floats(1, 1e4), st.floats(5, 99)), min_size=2, max_size=9, unique=True))
def test_no_candidate_beats_one_on_the_front(places: list[tuple[float, float]]) -> None:
    rows = [a_row(backend=f"b{i}", ms=ms, snr_db=db) for i, (ms, db) in enumerate(places)]
    best = report_charts.front(rows)
    at = [report_charts.place(r) for r in rows]
    for row in best:
        x, y = report_charts.place(row)
        assert not any(ms <= x and db >= y and (ms, db) != (x, y) for ms, db in at)
    for row in rows:
        x, y = report_charts.place(row)
        assert row in best or any(ms <= x and db >= y for ms, db in map(report_charts.place, best))


@given(st.dictionaries(st.text("abc", min_size=1, max_size=30), st.tuples(st.floats(0, 340), st.floats(0, 250))))
def test_texts_of_a_chart_cover_nothing(points: dict[str, tuple[float, float]]) -> None:
    sides = report_charts.text_sides(points, list(points))
    boxes = [report_charts.text_box(points[name], name, side) for name, side in sides.items()]
    for i, box in enumerate(boxes):
        assert not any(report_charts.overlap(box, other) for other in boxes[:i])
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in points.values())


def test_a_treemap_adds_up() -> None:
    """Plotly draws an empty picture where boxes sum to more than what holds them."""
    thirds = [
        OperatorTime(module=f"down_blocks.{i}.resnets.{j}.conv{k}", operator=o, kernel="k", ms=7 / 3, calls=1)
        for i in range(3) for j in range(2) for k in range(2) for o in ("convolution", "elementwise")
    ]  # fmt: skip
    nowhere = OperatorTime(module="", operator="layout", kernel="k", ms=0.7, calls=1)
    b = a_breakdown(run_ms=63.0).model_copy(update={"operators": [*thirds, nowhere]})
    (trace,) = report_modules.treemap(b)["data"]
    values = dict(zip(trace["ids"], trace["values"], strict=True))
    inside: dict[str, int] = {}
    for id_, parent in zip(trace["ids"], trace["parents"], strict=True):
        inside[parent] = inside.get(parent, 0) + values[id_]
    assert all(inside[parent] == values[parent] for parent in inside if parent)
    assert values["0"] / 1e3 == pytest.approx(24 * 7 / 3 + 0.7, abs=0.02)
    assert {"down_blocks.0", "resnets.1", "conv1", "convolution", report_modules.NOWHERE} <= set(trace["labels"])


def test_blocks_with_one_thing_in_them_are_one_box() -> None:
    b = a_breakdown()
    (trace,) = report_modules.treemap(b)["data"]
    labels = dict(zip(trace["labels"], trace["marker"]["colors"], strict=True))
    assert labels["mid_block.attentions.0"] == report_words.OPERATOR_COLOURS["attention"]
    assert labels["down_blocks.0"] == report_modules.MIXED


# --- the terminal ----------------------------------------------------------------------------------------------------


def printed(profile: Profile) -> str:
    out = io.StringIO()
    show_profile(profile, out)
    return out.getvalue()


def test_the_terminal_says_the_same() -> None:
    said = printed(a_full_profile())
    lines = said.splitlines()
    winner = next(line for line in lines if line.startswith("onnxruntime"))
    for words in ("int8", "31.0 ms", "32.2 ms", "2.48x", "0.999749", "33.0 dB", "217 MiB", "7.70 s", "fastest"):
        assert words in winner, words
    assert [line.split()[0] for line in lines[2:7]] == ["onnxruntime", "aoti", "torch.compile", "eager", "tensorrt"]
    assert sum("fastest" in line.split() for line in lines[2:7]) == 1
    assert "skipped: tensorrt fp16: tensorrt does not run on cpu" in said
    assert "The machine was busy" in said and "every wish is met (p95<100ms, cosine>=0.999)" in said
    assert "634 ms" in said and "0.77 EUR per 1000 images" in said
    assert said.index("ESTIMATES (not measured)") > said.index("every wish is met")
    assert [line for line in lines if "rtx-4090" in line] == lines[-3:-2]
    assert "ESTIMATES" not in printed(a_profile())


def test_names_are_no_markup_and_no_orders_to_a_terminal() -> None:
    name = "[bold red]x[/] \x1b[31m\x07 [link=file:///etc]y[/link]"
    said = printed(a_profile(rows=(a_row(component=name), a_row(component=name, state="failed", why=name))))
    assert "[bold red]x[/]" in said and "[link=file:///etc]y[/link]" in said
    assert "\x1b" not in said and "\x07" not in said
