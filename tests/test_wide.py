"""Eager fp16 with fp32's range: fp16's own numbers where fp16 holds them, 11 bits beyond."""

import pytest
import torch
from torch import nn

from optimize.compile.runners import EagerRunner, loaded_module
from optimize.compile.spec import Axis, Component, TensorSpec
from optimize.compile.wide import WideHalf, WideRange, to_11_bits


def eleven_bits(x):
    """The same by definition, in float64: a fraction of 11 bits, ties to even."""
    fraction, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.round(fraction * 2048) / 2048, exponent).float()


@pytest.mark.parametrize("scale", [1.0, 60000.0])
def test_numbers_that_fp16_holds_are_fp16s(scale):
    x = torch.cat([torch.rand(7, 63) * scale, torch.tensor([[1e-8] * 63, [0.0] * 63, [-torch.inf] * 63])])
    assert torch.equal(to_11_bits(x), x.half().float())


@pytest.mark.parametrize("scale", [1e5, 1e30, 1e-7, 1e-30])
def test_others_keep_11_bits(scale):
    x = torch.randn(77, 63) * scale
    assert torch.equal(to_11_bits(x), eleven_bits(x))
    assert not torch.equal(to_11_bits(x), x.half().float())


def test_ties_go_to_even():
    halfway = torch.tensor([2.0**17 * (1 + n / 2048) for n in (1, 3, 5)])
    assert to_11_bits(halfway).tolist() == [2.0**17 * (1 + n / 1024) for n in (0, 2, 2)]


class Net(nn.Module):
    """Products, sums, views written into, masks, mixed types: what a forward does with its dtype."""

    def __init__(self, gain=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(63, 63), nn.Linear(63, 63)
        self.gain = gain

    def forward(self, x):
        h = self.first(x) * self.gain
        h = h.clone()
        h[:, ::2] += 1
        h.view(-1)[:5].mul_(0.5)
        assert h.dtype == x.dtype
        mask = torch.zeros_like(h).masked_fill(h < 0, torch.finfo(h.dtype).min)
        share = (h.float() / self.gain).softmax(-1).to(h.dtype) + (mask + 1).exp()
        return self.last(nn.functional.layer_norm(h, (63,)) * share), h * torch.ones((), dtype=torch.float32)


def component(gain=1.0, weight=1.0):
    net = Net(gain)
    net.first.weight.data *= weight
    return Component.from_module(net, [TensorSpec("x", ("n", 63))], ["y", "h"], [Axis("n", 1, 7, 77)])


def outputs(c, precision, streamed=False, wide=False):
    x = torch.randn(7, 63, generator=torch.Generator().manual_seed(1)).half()
    with EagerRunner(c, precision, streamed=streamed, wide=wide) as eager:
        return eager.infer({"x": x if precision == "fp16" else x.float()})


@pytest.mark.parametrize("streamed", [False, True])
def test_where_nothing_overflows_it_is_eager_fp16(streamed):
    plain, wide = outputs(component(), "fp16"), outputs(component(), "fp16", streamed, wide=True)
    for name in ("y", "h"):
        assert plain[name].dtype == torch.float16 and wide[name].dtype == torch.float32
        error = (wide[name] - plain[name].float()).norm() / plain[name].float().norm()
        assert error < 3e-4, name
    assert torch.equal(wide["h"], plain["h"].float())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("gain", "weight"), [(3e5, 1.0), (1.0, 1e7)])
def test_where_fp16_overflows_it_has_fp16s_error_and_no_more(gain, weight, streamed):
    c = component(gain, weight)
    exact, wide = outputs(c, "fp32"), outputs(c, "fp16", streamed, wide=True)
    assert not outputs(c, "fp16")["h"].isfinite().all()
    for name in ("y", "h"):
        error = (wide[name] - exact[name]).norm() / exact[name].norm()
        assert 1e-5 < error < 2e-3, name
    assert torch.equal(wide["h"], eleven_bits(wide["h"]))


def test_types_are_what_they_are_in_fp16():
    net = loaded_module(component(), "fp16")
    with torch.no_grad(), WideRange():
        x = torch.randn(7, 63).half() * 1e5
        assert isinstance(x, WideHalf) and x.dtype == torch.float16 and float(x.abs().max()) > 65504
        assert (x.float() * 2).dtype == torch.float32 and (x * torch.ones(63)).dtype == torch.float32
        assert (x > 0).dtype == torch.bool and torch.finfo(x.dtype).max == 65504
        assert all(isinstance(t, WideHalf) for t in net(x))
