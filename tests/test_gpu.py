"""What only a GPU can show: sizes past 2^31 elements, CUDA graphs, streams, torch.compile, every config of the search
spaces. `make gpu` runs it, and the files of the interpreter too, there on the real kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optimize import kernels as K
from optimize.kernels import reference, tuning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("on_the_device"),
]
FP16, BF16 = torch.float16, torch.bfloat16
PAST = 2**31  # elements: a 32-bit offset would be negative


def relative(got: Tensor, expected: Tensor) -> float:
    return float(
        torch.linalg.vector_norm(got.double() - expected.double()) / torch.linalg.vector_norm(expected.double())
    )


def roomy(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib << 30:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free >> 30} are free")


def last(t: Tensor, rows: int, dim: int) -> Tensor:
    return t.narrow(dim, t.shape[dim] - rows, rows)


# --- far ends of large tensors ---------------------------------------------------------------------------------------


def test_attention_past_two_to_the_31() -> None:
    roomy(24)
    tokens = PAST // 128 + 4096
    q = torch.randn(1, 1, tokens, 128, dtype=FP16)
    k, v = (torch.randn(1, 1, 77, 128, dtype=FP16) for _ in range(2))
    got = K.attention(q, k, v, impl="triton")
    end = last(q, 199, 2)
    assert (
        relative(last(got, 199, 2), reference.attention(end.float(), k.float(), v.float(), None, False, 128**-0.5))
        < 1e-3
    )


def test_attention_over_keys_past_two_to_the_31() -> None:
    """Many heads: the last one's keys lie past the limit."""
    roomy(32)
    heads, keys = 4096, PAST // (4096 * 64) + 64
    q = torch.randn(1, heads, 1, 64, dtype=FP16)
    k = torch.randn(1, heads, keys, 64, dtype=FP16)
    got = K.attention(q, k, k, impl="triton")
    a, b = last(q, 2, 1).float(), last(k, 2, 1).float()
    assert relative(last(got, 2, 1), reference.attention(a, b, b, None, False, 64**-0.5)) < 1e-3


@pytest.mark.parametrize("call", [K.layer_norm, K.rms_norm], ids=["layer_norm", "rms_norm"])
def test_norms_past_two_to_the_31(call: Callable[..., Tensor]) -> None:
    roomy(24)
    x = torch.randn(1, PAST // 4096 + 77, 4096, dtype=BF16)
    got = call(x, impl="triton")
    assert relative(last(got, 63, 1), call(last(x, 63, 1).float(), impl="reference")) < 4e-3


@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_past_two_to_the_31(channels_last: bool) -> None:
    roomy(40)
    side = 8192 + 8
    x = torch.randn(1, 32, side, side, dtype=FP16)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    got = K.group_norm(x, 32, activation="silu", impl="triton")
    end = last(x, 1, 1).float().contiguous()
    assert relative(last(got, 1, 1), K.group_norm(end, 1, activation="silu", impl="reference")) < 2e-3


def test_gates_past_two_to_the_31() -> None:
    roomy(24)
    both = torch.randn(PAST // 8192 + 7, 8192, dtype=FP16)
    value, gate = both.chunk(2, -1)
    got = K.geglu(value, gate, impl="triton")
    assert (
        relative(last(got, 7, 0), K.geglu(last(value, 7, 0).float(), last(gate, 7, 0).float(), impl="reference")) < 2e-3
    )


# --- graphs, streams, compilation ------------------------------------------------------------------------------------


def calls() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """Each operation by Triton, with feeds."""
    x, w = torch.randn(3, 77, 320, dtype=FP16), torch.randn(3, 320, dtype=FP16)
    q, k = torch.randn(2, 8, 199, 40, dtype=FP16), torch.randn(2, 4, 199, 40, dtype=FP16)
    image = torch.randn(2, 64, 33, 35, dtype=FP16)
    turn = torch.randn(199, 20)
    return {
        "attention": (lambda q, k: K.attention(q, k, k, causal=True, impl="triton"), (q, k)),
        "group_norm": (lambda x: K.group_norm(x, 32, activation="silu", impl="triton"), (image,)),
        "layer_norm": (lambda x, w: K.layer_norm(x, residual=x, gate=w, scale=w, shift=w, impl="triton"), (x, w)),
        "rms_norm": (lambda x, w: K.rms_norm(x, w[0], impl="triton"), (x, w)),
        "qk_norm_rope": (lambda q, k, t: K.qk_norm_rope(q, k, None, None, t, t, impl="triton"), (q, k, turn)),
        "gated": (lambda x: K.swiglu(*x.chunk(2, -1), impl="triton"), (x,)),
    }


NAMES = ("attention", "group_norm", "layer_norm", "rms_norm", "qk_norm_rope", "gated")


def results(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_replays_on_new_numbers(name: str) -> None:
    call, feeds = calls()[name]
    results(call(*feeds))  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = results(call(*feeds))
    for feed in feeds:
        feed.copy_(torch.randn_like(feed))
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(held, results(call(*feeds)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_runs_on_the_current_stream(name: str) -> None:
    """Its input is still being made on that stream when it is launched: on any other it would read old numbers."""
    call, feeds = calls()[name]
    expected = [t.clone() for t in results(call(*(f * 2 for f in feeds)))]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        got = results(call(*(f * 2 for f in feeds)))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_in_one_graph(name: str) -> None:
    call, feeds = calls()[name]
    compiled: Any = torch.compile(call, fullgraph=True)
    for got, expected in zip(results(compiled(*feeds)), results(call(*feeds)), strict=True):
        assert torch.equal(got, expected)


# --- every config ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tuning_tries_every_config_and_they_agree(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tuning_on` measures the whole search space for what it meets; a config that gives another result is an error."""
    monkeypatch.setenv("OPTIMIZE_CACHE", str(tmp_path))
    tuning.forget()
    call, feeds = calls()[name]
    before = results(call(*feeds))
    with tuning.tuning_on(feeds[0].device):
        after = results(call(*feeds))
    assert tuning.cache_path().exists()
    for got, expected in zip(after, before, strict=True):
        assert relative(got, expected) < 2e-3
    tuning.forget()
