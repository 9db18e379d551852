"""GEGLU and SwiGLU in Triton's interpreter, against float64 and within twice torch's own error."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from optimize.kernels import triton_gated
from optimize.kernels.select import interpreting
from optimize.kernels.triton_gated import GatedConfig, launch

pytestmark = [
    pytest.mark.skipif(
        not interpreting() and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1, or a GPU"
    ),
    pytest.mark.usefixtures("on_the_device", "poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # of a sigmoid that is 0
]
TYPES = (torch.float32, torch.float16, torch.bfloat16)
Budget = Callable[[Tensor, Tensor, Tensor], None]
TRUE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * torch.special.ndtr(x),
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
EAGER: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def check(budget: Budget, value: Tensor, gate: Tensor, activation: str) -> None:
    ours = launch(value, gate, activation)
    assert ours.is_contiguous()
    theirs, truth = value * EAGER[activation](gate), value.double() * TRUE[activation](gate.double())
    budget(ours, theirs.contiguous(), truth)


def halves(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of one projection, as they come."""
    torch.manual_seed(sum(shape))
    value, gate = (2 * torch.randn(*shape[:-1], 2 * shape[-1])).to(dtype).chunk(2, -1)
    return value, gate


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", TRUE)
@pytest.mark.parametrize("rows", (1, 7, 63, 77, 199, 1128))
def test_rows(rows: int, activation: str, dtype: torch.dtype, within_budget: Budget) -> None:
    check(within_budget, *halves(rows, 40, dtype=dtype), activation)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", TRUE)
@pytest.mark.parametrize("columns", (1, 72, 320, 1000, 5120))
def test_columns(columns: int, activation: str, dtype: torch.dtype, within_budget: Budget) -> None:
    check(within_budget, *halves(7, columns, dtype=dtype), activation)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "three leading dimensions": lambda x: x.unflatten(1, (3, 4)),
    "every second row": lambda x: x[:, ::2],
    "rows across": lambda x: x.transpose(0, 1),
    "columns across": lambda x: x.transpose(1, 2),
    "every third column": lambda x: x[..., ::3],
    "one row for all": lambda x: x[:, :1].expand(-1, 12, -1),
    "one dimension": lambda x: x[0, 0],
    "odd offset": lambda x: x[..., 3:],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, within_budget: Budget) -> None:
    for dtype in TYPES:
        value, gate = (LAYOUTS[name](t) for t in halves(3, 12, 40, dtype=dtype))
        check(within_budget, value, gate, "gelu")
        check(within_budget, value, gate.contiguous(), "silu")


@pytest.mark.parametrize("config", (GatedConfig(1, 16, 1), GatedConfig(8, 64, 1), GatedConfig(4, 32, 1)), ids=str)
def test_tiles(config: GatedConfig, monkeypatch: pytest.MonkeyPatch, within_budget: Budget) -> None:
    monkeypatch.setattr(triton_gated, "config_for", lambda *_: config)
    check(within_budget, *halves(11, 40, dtype=torch.float16), "gelu_tanh")


@pytest.mark.parametrize("activation", TRUE)
def test_far_gates(activation: str) -> None:
    """No overflow on the way: the gate is 0 far below, itself far above."""
    gate = torch.tensor([-60000.0, -1000.0, -100.0, 0.0, 100.0, 1000.0, 60000.0])
    result = launch(torch.ones_like(gate), gate, activation)
    assert torch.equal(result, gate.clamp_min(0))
