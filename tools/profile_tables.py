"""A profile in the terminal: the answer, every candidate, what to mind, and estimates in a table of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from .report_facts import COLUMNS, Column
from .report_views import answer, notes
from .report_words import (
    NONE,
    decibels,
    fastest,
    groups,
    milliseconds,
    percent,
    size,
    sizes_words,
    snr_of,
    timed,
    times,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from optimize.profiles.schema import Profile, Row

VERDICTS = {"slower": "red", "faster": "green", "undecided": "yellow"}
STATES = {"measured": "green", "inconclusive": "yellow", "failed": "red", "skipped": "dim"}
PIPE_WIDTH = 200
FIGURES = {
    "median": COLUMNS["median"],
    "p90": COLUMNS["p90"],
    "speed": Column(("ratio.value",), times),
    "cosine": COLUMNS["cosine"],
    "SNR": COLUMNS["SNR"],
    "memory": Column(("memory.device", "memory.host"), size),
    "compile": COLUMNS["compile"],
}


def show_profile(profile: Profile, stream: TextIO | None = None) -> None:
    """Prints it on stdout, or `stream`; a terminal's width is kept to, a pipe gets whole lines."""
    from rich.console import Console

    out = stream or sys.stdout
    console = Console(file=out, width=None if out.isatty() else PIPE_WIDTH, highlight=False)
    for component, shape, rows in groups(profile):
        console.print(rows_table(component, shape, rows))
        show_reasons(console, rows)
        console.print()
    show_pipelines(console, profile)
    show_comparison(console, profile)
    show_notes(console, profile)
    show_answer(console, profile)
    show_estimates(console, profile)


def plain_table(title: str, columns: Sequence[str], left: Iterable[str]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False, title=escape(title), title_justify="left",
                  title_style="bold")  # fmt: skip
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def text(value: str, style: str = "") -> Any:
    """Never markup: names come from the record. Without control characters: a terminal obeys those."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else " " for c in value), style)


# --- candidates ------------------------------------------------------------------------------------------------------


def rows_table(component: str, shape: str, rows: Sequence[Row]) -> Table:
    table = plain_table("", ("backend", "precision", *FIGURES, "state"), ("backend", "precision", "state"))
    table.title = text(f"{component} at {shape} ({sizes_words(rows[0].sizes)})", "bold")
    winner = fastest(rows)
    without = [r for r in rows if r.timing is None]
    for row in [*timed(rows), *without]:
        style = "bold" if row is winner else "dim" if row.timing is None else ""
        state = ("fastest" if row.state == "measured" else f"fastest, {row.state}") if row is winner else row.state
        table.add_row(*(text(c, style) for c in words_of(row)), text(state, STATES[row.state]))
    return table


def words_of(row: Row) -> list[str]:
    snr = snr_of(row)  # by parity, where there were no samples
    cells = {name: column.of(row)[0] for name, column in FIGURES.items()} | {"SNR": decibels(snr)}
    return [row.backend, row.precision, *cells.values()]


def show_reasons(console: Console, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.why and row.state != "measured":
            console.print(text(f"  {row.state}: ", STATES[row.state]) + text(f"{row.candidate}: {row.why}"))


# --- beside them -----------------------------------------------------------------------------------------------------


def show_pipelines(console: Console, profile: Profile) -> None:
    if not profile.pipelines:
        return
    table = plain_table("time per image", ("as", "sizes", "steps", "composed", "measured", "by component"),
                        ("as", "sizes", "by component"))  # fmt: skip
    for p in sorted(profile.pipelines, key=lambda p: (p.shape, p.composed_ms)):
        parts = ", ".join(f"{x.component} {percent(x.ms / p.composed_ms)}" for x in p.parts)
        row = (p.variant, p.shape, str(p.steps), milliseconds(p.composed_ms), milliseconds(p.measured_ms), parts)
        table.add_row(*map(text, row))
    console.print(table)
    console.print()


def show_comparison(console: Console, profile: Profile) -> None:
    compared = profile.comparison
    if compared is None:
        return
    changed = [c for c in compared.changes if c.verdict != "same"]
    same = len(compared.changes) - len(changed)
    undecided = sum(c.verdict == "undecided" for c in changed)
    told = f"{same} the same" + (f", {undecided} UNDECIDED" if undecided else "")
    console.print(text(f"against {compared.against} ({compared.made}): {told}", "bold"))
    if changed:
        names = ("component", "sizes", "candidate", "before", "now", "change", "verdict", "why")
        table = plain_table("", names, ("component", "sizes", "candidate", "verdict", "why"))
        table.title = None
        for c in sorted(changed, key=lambda c: -(c.ratio or 0)):
            change = NONE if c.ratio is None else f"{c.ratio - 1:+.1%}"
            figures = (milliseconds(c.before_ms), milliseconds(c.after_ms), change)
            table.add_row(*map(text, (c.component, c.shape, c.candidate, *figures)),
                          text(c.verdict, VERDICTS.get(c.verdict, "")),
                          text(c.why))  # fmt: skip
        console.print(table)
    for note in compared.notes:
        console.print(text(f"  {note}", "yellow"))
    console.print()


def show_notes(console: Console, profile: Profile) -> None:
    view = notes(profile)
    for kind, title, words in view["notes"] if view else ():
        style = {"bad": "bold red", "warn": "yellow"}.get(kind, "dim")
        console.print(text(f"{title}: ", style) + text(words))
    if view:
        console.print()


def show_answer(console: Console, profile: Profile) -> None:
    view = answer(profile)
    if view is None:
        return
    wishes = f" ({', '.join(view['wishes'])})" if view["wishes"] else ""
    verdict = "every wish is met" if view["met"] else "NOBODY meets every wish; the nearest"
    head = f"{verdict}{wishes}" if wishes else "the choice, with no wish" if view["chosen"] else "the fastest of each"
    console.print(text(head, "bold green" if view["met"] else "bold red"))
    for miss in view["missed"]:
        console.print(text(f"  {miss}", "red"))
    for c in view["cards"]:
        figures = ", ".join(filter(None, (c["latency"], c["speed"], c["quality"], c["memory"])))
        where, what = f"  {c['component']} at {c['measured_at']}: ", f"{c['backend']} {c['precision']}"
        console.print(text(where) + text(what, "bold") + text(f", {figures}"))
        if view["chosen"]:
            console.print(text(f"    {c['why']}" + (f"; next: {c['runner_up']}" if c["runner_up"] else ""), "dim"))
    if view["pipeline"]:
        p = view["pipeline"]
        measured = f", {p['measured']}" if p["measured"] else ""
        console.print(text(f"  {p['time']} per image, composed ({p['per']}){measured}"))
    for value, what in view["cost"]:
        console.print(text(f"  {value} {what}"))


def show_estimates(console: Console, profile: Profile) -> None:
    if not profile.estimates:
        return
    console.print()
    names = ("target", "component", "sizes", "precision", "estimate", "bound by", "assumed share")
    table = plain_table("", names, ("target", "component", "sizes", "precision", "bound by"))
    table.title = text("ESTIMATES (not measured)", "bold yellow")
    for e in profile.estimates:
        row = (e.target, e.component, e.shape, e.precision, f"~{milliseconds(e.latency_ms)}", e.bound)
        table.add_row(*map(text, (*row, percent(e.share))))
    console.print(table)
    for assumption in dict.fromkeys(a for e in profile.estimates for a in e.assumptions):
        console.print(text(f"  assumed: {assumption}", "dim"))
