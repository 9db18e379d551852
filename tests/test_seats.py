"""Seats on a GPU's books: what one takes is its own, and candidates that fit go together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from optimize import measuring, seats
from optimize.candidates import REFERENCE, Candidate
from optimize.compile.sources import source_from_text
from optimize.measuring import Task, groups_of
from optimize.profiles.schema import Settings
from optimize.profiles.workers import Worker
from optimize.seats import Job, Seat

SETTINGS = Settings(rounds=3, burst_ms=5, warmup_ms=1, attempts=1, drift=0.03, spread=0.1, seed=0)


def test_what_others_take_of_a_gpu_is_not_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are opened one after another, and only then bound: before, the first one's peak was that of all."""
    used = 100
    monkeypatch.setattr(seats, "used_bytes", lambda _: used)
    first, second = (Seat(lambda: None, "cuda") for _ in range(2))  # type: ignore[arg-type, return-value]
    with first.counted():
        used += 7
    with second.counted():
        used += 1000
    with first.counted():
        used += 70
    with first.counted():
        used -= 50  # given back: the peak stays
    assert [s.memory() for s in (first, second)] == [{"host": None, "device": 77}, {"host": None, "device": 1000}]


def test_a_worker_keeps_freed_memory_but_for_the_users_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "63")
    worker = Worker("optimize.seats", asdict(Job("m", "eager", "fp32")))
    try:
        words = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
    finally:
        worker.close()
    assert {b"MALLOC_TRIM_THRESHOLD_=63", b"MALLOC_MMAP_THRESHOLD_=33554432"} <= set(words)


def test_a_worker_of_few_threads_has_a_core_for_each() -> None:
    cores = os.sched_getaffinity(0)
    for threads, expected in ((1, {min(cores)}), (0, cores)):
        worker = Worker("optimize.seats", asdict(Job("m", "eager", "fp32")), threads)
        try:
            assert os.sched_getaffinity(worker.pid) == expected
        finally:
            worker.close()


def names(words: Sequence[str]) -> list[Candidate]:
    return [Candidate(Job("m", *word.split())) for word in words]


def test_candidates_are_grouped_by_what_each_of_them_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 takes half of fp32; a candidate that fits nowhere is tried alone with the reference; none is left out."""
    (component,) = source_from_text("arch:clip-l@tiny").components
    numbers = sum(p.numel() for p in component.build().parameters())
    chosen = names([REFERENCE, "a fp16", "b bf16", "c fp32", "d int8"])
    task = Task(component, chosen, {}, SETTINGS, "cuda", tmp_path, lambda job: None)  # type: ignore[arg-type, return-value]

    def grouped(weights: float) -> list[list[str]]:
        """With room for so many times the fp32 weights."""
        free = weights * 4 * numbers * measuring.COPIES["cuda"] / measuring.HEADROOM
        monkeypatch.setattr(measuring, "free_bytes", lambda _: free)
        return [[c.name for c in group] for group in groups_of(task, chosen, chosen[0])]

    assert grouped(4.01) == [[REFERENCE, "a fp16", "b bf16", "c fp32", "d int8"]]
    assert grouped(2.01) == [[REFERENCE, "a fp16", "b bf16"], [REFERENCE, "c fp32"], [REFERENCE, "d int8"]]
    assert grouped(0.5) == [[REFERENCE, n] for n in ("a fp16", "b bf16", "c fp32", "d int8")]
    assert [[c.name for c in g] for g in groups_of(task, chosen[:1], chosen[0])] == [[REFERENCE]]
