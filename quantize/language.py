"""Feeds of text models: sentences through the model's own tokenizer, and for decoders a past of their own making."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from optimize.compile.runners import EagerRunner
from optimize.compile.spec import Axis, Component
from optimize.errors import InputError

from .sets import SetWriter
from .synthetic import eager, within
from .texts import SENTENCES, share_of

Words = Callable[[int, int], torch.Tensor]
"""`words(text, n)`: the first n token ids of that text."""
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
ROWS = 4
"""Sentences of one sample, where the batch axis allows it."""
LENGTHS = (0, 32, 0, 128, 16, 64)
"""What the samples are padded to, in turn; 0 is the longest sentence of the sample."""
PASTS = (16, 63, 7, 128, 32, 1)
CHUNKS = (32, 7, 63, 16, 128, 1)
"""Tokens of a decoder's past, and of what it is given at once when it has none."""


def has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in TOKENIZERS)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # each kind of tokenizer raises its own
        raise InputError(
            f"the tokenizer in {folder} cannot be loaded",
            got=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}",
            expected="what save_pretrained writes",
            mend="fetch its files again, or give --calibration FILE",
        ) from e
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def shuffled(seed: int, turn: int) -> list[str]:
    """The sentences of a seed's share in another order each turn."""
    rng, texts = torch.Generator().manual_seed(seed * 1_000_003 + turn), share_of(SENTENCES, seed)
    return [texts[i] for i in torch.randperm(len(texts), generator=rng).tolist()]


def sentences(writer: SetWriter, component: Component, folder: Path, seed: int) -> None:
    """An encoder's ids, masks and types: a few sentences a sample, padded to different lengths."""
    tokenizer = tokenizer_of(folder)
    rows = within(component.axes["batch"], ROWS)
    count = len(share_of(SENTENCES, seed))
    turns = count // rows or 1
    for i in range(len(writer.notes), writer.total or 0):
        texts = (shuffled(seed, i // turns) * (1 + rows // count))[i % turns * rows :][:rows]
        feeds = encoded(tokenizer, texts, component, LENGTHS[i % len(LENGTHS)])
        writer.add(feeds, {"text": texts[0], "tokens": feeds["input_ids"].shape[1]})


def encoded(tokenizer: Any, texts: Sequence[str], component: Component, length: int) -> dict[str, torch.Tensor]:
    axis = component.axes["tokens"]
    longest = tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"].shape[1]
    words = {"padding": "max_length", "truncation": True, "max_length": within(axis, max(length, longest))}
    found = tokenizer(list(texts), return_tensors="pt", **words)
    ids = found["input_ids"]
    given = {
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        **{k: v for k, v in found.items()},
    }
    return {t.name: given[t.name].to(torch.int64) for t in component.inputs}


# --- decoders ---------------------------------------------------------------------------------------------------------


def random_words(component: Component, seed: int) -> Words:
    """Random ids of the vocabulary."""
    most = int(component.inputs[0].fill.partition(":")[2])

    def words(text: int, count: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + text)
        return torch.randint(0, most, (count,), generator=rng)

    return words


def real_words(folder: Path, seed: int) -> Words:
    """The sentences in another order for each text."""
    tokenizer = tokenizer_of(folder)

    def words(text: int, count: int) -> torch.Tensor:
        ids: list[int] = []
        while len(ids) < count:
            ids += tokenizer(" ".join(shuffled(seed, text)))["input_ids"]
        return torch.tensor(ids[:count])

    return words


def continuations(writer: SetWriter, component: Component, words: Words) -> None:
    """Prefill and decode in turn, as far as the axes have them: the past is what the model made of the text before."""
    rows = within(component.axes["batch"], 1)
    with eager(component) as runner:
        for i in range(len(writer.notes), writer.total or 0):
            before, now = lengths_at(i, component.axes["tokens"], component.axes["past"])
            ids = torch.stack([words(i * rows + row, before + now) for row in range(rows)])
            feeds = with_past(ids[:, before:], past_of(runner, component, ids[:, :before]))
            writer.add(feeds, {"past": before, "tokens": now})


def lengths_at(i: int, tokens: Axis, past: Axis) -> tuple[int, int]:
    """(tokens before, tokens now) of sample i: odd ones decode."""
    turn = i // 2
    if past.min == 0 and (past.max == 0 or i % 2 == 0):
        return 0, within(tokens, CHUNKS[turn % len(CHUNKS)])
    return max(1, within(past, PASTS[turn % len(PASTS)])), within(tokens, 1)


def past_of(runner: EagerRunner, component: Component, ids: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Keys and values that the model has after ids `[rows, tokens]`, by the names of its inputs."""
    specs = component.inputs[3:]
    nothing = {t.name: torch.zeros(t.sizes({"batch": len(ids), "past": 0})) for t in specs}
    if not ids.shape[1]:
        return nothing
    outputs = runner.infer(with_past(ids, nothing))
    return {t.name: outputs[n] for t, n in zip(specs, component.outputs[1:], strict=True)}


def with_past(ids: torch.Tensor, past: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The feeds of an `lm` component: ids `[rows, tokens]` after a past, nothing padded."""
    before, (rows, now) = next(t.shape[2] for t in past.values()), ids.shape
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(rows, before + now, dtype=torch.int64),
        "position_ids": torch.arange(before, before + now).expand(rows, now),
        **past,
    }
