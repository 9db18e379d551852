"""Progress on stderr: a line per step with its elapsed time, and nothing at all where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """`with progress.step("unet fp16: trace"): ...`; `progress.part(done, total)` shows a share inside a step."""

    def __init__(self, enabled: bool | None = None) -> None:
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self._status: Any = None
        self._text, self._start = "", 0.0
        self._console: Any = None

    def console(self) -> Any:
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        return self._console

    def say(self, text: str) -> None:
        """Names what is being done inside the current step."""
        if self._status is not None:
            self._status.update(f"{self._text}: {text} [{time.perf_counter() - self._start:.0f} s]")

    def part(self, done: float, total: float) -> None:
        self.say(f"{100 * done / max(total, 1):.0f} %")

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Shows a spinner while the body runs, and a line with its time when it took more than two seconds."""
        if not self.enabled:
            yield
            return
        self._text, self._start = text, time.perf_counter()
        with self.console().status(text) as self._status:
            yield
        self._status = None
        elapsed = time.perf_counter() - self._start
        if elapsed > 2:
            self.console().print(f"[green]✓[/] {text} [dim]{elapsed:.1f} s[/]", highlight=False)
