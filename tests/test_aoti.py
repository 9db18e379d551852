"""AOTInductor: a fused module compiled ahead of time, our operators in it, at batches that were not traced."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimize.kernels import fuse, ops

CHANNELS, HEADS, HEAD_DIM, TEXT = 32, 2, 16, 24
HEIGHT, WIDTH = 7, 9


@pytest.fixture(scope="module", autouse=True)
def no_grad() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# --- where results lie -----------------------------------------------------------------------------------------------


def apart(*shape: int) -> Tensor:
    """As `x.flatten(2).transpose(1, 2)` leaves it: the last two dimensions the other way round in memory."""
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def per_token(*shape: int) -> tuple[Tensor, Tensor]:
    return apart(*shape), apart(*shape)


ROWS, PER_HEAD, IMAGE = (2, 7, 12), (2, 3, 7, 16), (2, 8, 7, 9)
WIDE = torch.randn(ROWS[-1])
ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "attention": lambda: (apart(*PER_HEAD), apart(*PER_HEAD), apart(*PER_HEAD), None, True, 0.25),
    "group_norm": lambda: (apart(*IMAGE), 4, None, None, 1e-5, "silu"),
    "layer_norm": lambda: (apart(*ROWS), WIDE, None, 1e-5, *per_token(*ROWS)),
    "rms_norm": lambda: (apart(*ROWS), None, 1e-5, *per_token(*ROWS)),
    "add_layer_norm": lambda: (apart(*ROWS), apart(*ROWS), apart(*ROWS), None, None, 1e-5, *per_token(*ROWS)),
    "add_rms_norm": lambda: (apart(*ROWS), apart(*ROWS), None, WIDE, 1e-5, None, None),
    "qk_norm_rope": lambda: (apart(*PER_HEAD), apart(*PER_HEAD), None, None, *torch.rand(2, 7, 8), 1e-5, True),
    "gated": lambda: (apart(*ROWS), apart(*ROWS), "gelu"),
}


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_results_lie_where_the_fake_says(name: str) -> None:
    """Code that AOTInductor made takes the fake's strides for granted: others are wrong numbers, not an error."""
    given = ARGUMENTS[name]()
    real = getattr(torch.ops.optimize, name)(*given, "reference")
    fake = getattr(torch.ops.optimize, name)(
        *(t.to("meta") if isinstance(t, Tensor) else t for t in given), "reference"
    )
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (real, fake)), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_results_lie_where_the_fake_says_for_images_that_are_channels_last() -> None:
    x = torch.randn(*IMAGE).to(memory_format=torch.channels_last)
    assert ops.group_norm(x, 4).stride() == ops.group_norm(x.to("meta"), 4).stride() == x.stride()


# --- a package -------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A layer each of a U-Net, of FLUX and of llama: between them they have every operation."""

    def __init__(self) -> None:
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

        super().__init__()
        self.resnet = ResnetBlock2D(in_channels=CHANNELS, groups=4, temb_channels=CHANNELS)
        self.block = BasicTransformerBlock(CHANNELS, HEADS, HEAD_DIM, cross_attention_dim=TEXT, activation_fn="geglu")
        self.flux = FluxTransformerBlock(CHANNELS, HEADS, HEAD_DIM)
        self.norm, self.then = LlamaRMSNorm(CHANNELS), LlamaRMSNorm(CHANNELS)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=CHANNELS, intermediate_size=40))

    def forward(self, image: Tensor, time: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.resnet(image, time).flatten(2).transpose(1, 2)
        x = self.block(x, encoder_hidden_states=text)
        _, y = self.flux(x, x[:, :1], time, (cos, sin))
        x = x + y
        normed = self.norm(x)
        return x + self.then(self.mlp(normed))


def inputs(batch: int) -> tuple[Tensor, ...]:
    angles = (torch.rand(HEIGHT * WIDTH + 1, HEAD_DIM // 2) * 6).repeat_interleave(2, -1)
    image, time, text = (torch.randn(batch, *s) for s in ((CHANNELS, HEIGHT, WIDTH), (CHANNELS,), (5, TEXT)))
    return image, time, text, angles.cos(), angles.sin()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused model's package, and beside it inputs and eager results (of the plain model) at three batches."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler (g++ or clang++)")
    folder = tmp_path_factory.mktemp("aoti")
    model = Model().eval()
    cases = [inputs(n) for n in (1, 2, 5)]
    torch.save([(case, model(*case)) for case in cases], folder / "cases.pt")
    fuse(model)
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    program = torch.export.export(model, inputs(3), dynamic_shapes=(batch, batch, batch, None, None))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {f"optimize.{name}.default" for name in ops.OPERATORS} <= called, "the model has every operation"
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return folder


RUN = """
import sys, torch
{first}
folder = sys.argv[1]
run = torch._inductor.aoti_load_package(folder + "/model.pt2")
for given, expected in torch.load(folder + "/cases.pt"):
    found = run(*given)
    print(len(found), float((found - expected).norm() / expected.norm()))
"""


def ran(folder: Path, first: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", RUN.format(first=first), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_runs_in_another_process(package: Path) -> None:
    done = ran(package, "import optimize.kernels.ops")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [int(n) for n, _ in rows] == [1, 2, 5]
    assert max(float(error) for _, error in rows) <= 1e-5


def test_the_operators_have_to_be_there_first(package: Path) -> None:
    done = ran(package, "")
    assert done.returncode != 0 and "Could not find schema for optimize::" in done.stderr
