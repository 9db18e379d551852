"""The jobs of `bench_quantize` that measure: a side beside its base, and what quantizing does to sentences' ranking."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch

from optimize.compile.bundle import Bundle
from optimize.compile.runners import Feeds, OnnxRuntimeRunner, loaded_module
from optimize.compile.spec import Component
from optimize.errors import GateError
from optimize.loading import component_of
from optimize.quantize.sets import read_set
from optimize.receipts import compared
from optimize.tools.bench_judge import bytes_of_graph, external_files
from optimize.tools.bench_native import LEAST_SAMPLE_S, pinned, spread
from optimize.tools.bench_workers import Job

Infer = Callable[[Feeds], dict[str, torch.Tensor]]
LEAST_ROUNDS = 3
SENTENCES = 60


@contextmanager
def eager_bf16(component: Component) -> Iterator[Infer]:
    """torch as it is, its weights in bf16."""
    module = loaded_module(component, "bf16").eval()

    def infer(feeds: Feeds) -> dict[str, torch.Tensor]:
        kinds = {t.name: getattr(torch, t.torch_dtype("bf16")) for t in component.inputs}
        with torch.inference_mode():
            outputs = module(*(feeds[n].to(kind) for n, kind in kinds.items()))
        return dict(zip(component.outputs, outputs, strict=True))

    yield infer


@contextmanager
def graph_of(path: str, threads: int) -> Iterator[Infer]:
    with OnnxRuntimeRunner(Path(path), threads=threads) as runner:
        yield runner.infer


@contextmanager
def side_of(job: Job, threads: int) -> Iterator[Infer]:
    if "side" in job.graphs:
        with graph_of(job.graphs["side"], threads) as infer:
            yield infer
    else:
        torch.set_num_threads(threads)
        with eager_bf16(component_of(Bundle.read(Path(job.words["bundle"])), job.words["component"])) as infer:
            yield infer


def pair(job: Job) -> dict[str, Any]:
    """The side's figures against the base on held-out samples, then both in turn on the first of them, for each number
    of threads, the process pinned to as many cores.

    GateError for a side with numbers that are not finite: it is not timed.
    """
    samples, cores = read_set(Path(job.samples)), sorted(os.sched_getaffinity(0))
    found: dict[str, Any] = {"latency": {}}
    if "side" in job.graphs:
        path = Path(job.graphs["side"])
        found["bytes"] = bytes_of_graph(path, external_files(onnx.load(str(path), load_external_data=False)))
    for threads in job.words["threads"]:
        pinned(threads, cores)
        with graph_of(job.model, threads) as base, side_of(job, threads) as side:
            if "quality" not in found:
                found["quality"] = figures(base, side, samples)
            both = {"base": base, "side": side}
            found["latency"][str(threads)] = timed(both, next(iter(samples)), job.runs, job.words["seconds"])
    return found


def figures(base: Infer, side: Infer, samples: Any) -> dict[str, Any]:
    """Of the first output, and of the worst by cosine."""
    rows = compared(base, side, samples)
    for row in rows:
        if not row.cosine == row.cosine:
            raise GateError("its numbers are not finite", got=row.output, expected="finite outputs")
    first, worst = rows[0], min(rows, key=lambda r: r.cosine)
    return {"first": first.model_dump(), "worst": worst.model_dump(), "samples": len(samples)}


def timed(sides: Mapping[str, Infer], feeds: Feeds, rounds: int, seconds: float) -> dict[str, Any]:
    """Sides in random order, round after round, until there are enough or `seconds` have passed. `ratio` is of the two
    in one round, side over base."""
    once = {name: seconds_of(infer, feeds, 1) for name, infer in sides.items()}  # the first run of each is not counted
    once = {name: seconds_of(infer, feeds, 1) for name, infer in sides.items()}
    calls = {name: max(1, round(LEAST_SAMPLE_S / max(s, 1e-6))) for name, s in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    rng, end = random.Random(0), time.perf_counter() + seconds
    while len(samples["base"]) < min(rounds, LEAST_ROUNDS) or (
        len(samples["base"]) < rounds and time.perf_counter() < end
    ):
        for name in rng.sample(sorted(sides), len(sides)):
            samples[name].append(seconds_of(sides[name], feeds, calls[name]))
    ratios = sorted(a / b for a, b in zip(samples["side"], samples["base"], strict=True))
    return {
        **{name: spread(s) for name, s in samples.items()},
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "rounds": len(ratios),
    }


def seconds_of(infer: Infer, feeds: Feeds, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        infer(feeds)
    return (time.perf_counter() - start) / calls


# --- sentences -------------------------------------------------------------------------------------------------------


def texts() -> Mapping[str, Sequence[str]]:
    """Sentences that calibration draws from, and some of Python's own manual, which it has never seen."""
    from pydoc_data.topics import topics

    from optimize.quantize.texts import SENTENCES as CALIBRATED

    paragraphs = (" ".join(p.split()) for topic in sorted(topics) for p in topics[topic].split("\n\n")[1:3])
    prose = [p.split(". ")[0] for p in paragraphs if p[:1].isupper() and 6 <= len(p.split(". ")[0].split()) <= 40]
    return {"calibrated on": CALIBRATED[:SENTENCES], "Python's manual": list(dict.fromkeys(prose))[:SENTENCES]}


def embedded(infer: Infer, component: Component, tokenizer: Any, sentences: Sequence[str]) -> torch.Tensor:
    """Mean pooled and of length one: `[sentences, hidden]`, one sentence at a time, so that none is padded."""
    from optimize.quantize.language import encoded

    rows = []
    for text in sentences:
        states = infer(encoded(tokenizer, [text], component, 0))[component.outputs[0]]
        rows.append(torch.nn.functional.normalize(states.float().mean(1), dim=1))
    return torch.cat(rows)


def rank(job: Job) -> dict[str, Any]:
    """Spearman's correlation of all pairs' similarities, base and each graph."""
    from torchmetrics.functional.regression import spearman_corrcoef

    from optimize.quantize.language import tokenizer_of

    component = component_of(Bundle.read(Path(job.words["bundle"])), job.words["component"])
    tokenizer, found = tokenizer_of(Path(job.words["tokenizer"])), dict[str, Any]()
    for kind, sentences in texts().items():
        pairs = torch.triu_indices(len(sentences), len(sentences), 1)
        similar = {}
        for side, path in {"base": job.model, **job.graphs}.items():
            with graph_of(path, 0) as infer:
                rows = embedded(infer, component, tokenizer, sentences)
            similar[side] = (rows @ rows.T)[pairs[0], pairs[1]]
        found[kind] = {
            "sentences": len(sentences),
            "spearman": {s: float(spearman_corrcoef(v, similar["base"])) for s, v in similar.items() if s != "base"},
        }
    return found


JOBS: Mapping[str, Callable[[Job], dict[str, Any]]] = {"pair": pair, "rank": rank}
