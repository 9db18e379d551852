"""What `bench_kernels` measures: real shapes, the sides that compute each, and the goals that they are held to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimize import kernels as K

Call = Callable[[], Any]


class Goal(NamedTuple):
    """A row of the goal table. `least`: larger is better; otherwise smaller."""

    what: str
    floor: float
    goal: float
    moon: float
    least: bool = True

    def mark(self, value: float) -> str:
        sign = 1 if self.least else -1
        return next((n for n in ("moon", "goal", "floor") if sign * value >= sign * getattr(self, n)), "missed")


GOALS: Mapping[str, Goal] = {
    "G1": Goal("attention bf16, head size 128, 2k to 16k tokens: speed of ours / of the best other", 0.75, 0.95, 1.02),
    "G2": Goal("the same at head size 64", 0.80, 1.00, 1.10),
    "G3": Goal("FLUX's shape: speed of ours / of torch's default SDPA", 1.4, 1.85, 2.0),
    "G4": Goal("cross-attention to 77 tokens, SDXL's shapes: speed of ours / of the best other", 1.0, 1.15, 1.4),
    "G5": Goal("norms of 64 MB and more: least bytes over time / measured copy", 0.88, 0.95, 0.98),
    "G6": Goal("the same at 8 to 32 MB, cold L2", 0.65, 0.78, 0.85),
    "G7": Goal("GroupNorm and SiLU at VAE shapes: eager's time / ours", 6, 14, 18),
    "G8": Goal("a DiT block with our norms in torch.compile / without: latency", 1.00, 0.95, 0.88, least=False),
}


@dataclass(frozen=True)
class Case:
    """One measurement: `sides(device)` makes the feeds and gives the callables, ours under "ours", and what is exact.

    `flops` and `least_bytes` are what the maths needs: each input read once, each output written once. `against` names
    the side of the ratio, "best" for the fastest other, "copy" for the measured copy.
    """

    name: str
    goal: str
    against: str
    sides: Callable[[torch.device], Sides]
    flops: float = 0.0
    least_bytes: int = 0
    slow: bool = False  # has sides that take seconds to compile
    operation: str = ""  # and its size as `kernels.select` sees it, (work, width): what `auto`'s thresholds are made of
    size: tuple[int, int] = (0, 0)


class Sides(NamedTuple):
    """Callables by name, and a check: the relative error of a result against float64 arithmetic."""

    calls: Mapping[str, Call]
    error: Callable[[Any], float]


def relative(got: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(got.double() - exact) / torch.linalg.vector_norm(exact))


def drawn(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """batch, heads, kv_heads, queries, keys, head_dim."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    causal: bool = False
    flex: bool = False  # FlexAttention too: it compiles for seconds at each shape

    def flops(self) -> float:
        share = 0.5 if self.causal and self.queries == self.keys else 1.0
        return 4.0 * self.batch * self.heads * self.queries * self.keys * self.head_dim * share

    def least_bytes(self, size: int = 2) -> int:
        tokens = 2 * self.heads * self.queries + 2 * self.kv_heads * self.keys
        return self.batch * tokens * self.head_dim * size


ROWS = 256  # queries that are compared with float64


def exact_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, rows: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in float64 for some queries, one head after another."""
    times, keys = q.shape[1] // k.shape[1], k.shape[2]
    out = []
    for head in range(q.shape[1]):
        a, b, c = q[:, head, rows].double(), k[:, head // times].double(), v[:, head // times].double()
        scores = a @ b.transpose(-1, -2) * q.shape[-1] ** -0.5
        if causal:
            seen = rows[:, None] + keys - q.shape[2] >= torch.arange(keys, device=q.device)
            scores = scores.masked_fill(~seen, -torch.inf)
        out.append(scores.softmax(-1) @ c)
    return torch.stack(out, 1)


def by_backend(backend: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    from torch.nn.attention import sdpa_kernel

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return call


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=str(q.device))
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def attention_sides(h: Heads) -> Callable[[torch.device], Sides]:
    def sides(device: torch.device) -> Sides:
        from torch.nn.attention import SDPBackend

        q = drawn(device, h.batch, h.queries, h.heads, h.head_dim).transpose(1, 2)
        k, v = (drawn(device, h.batch, h.keys, h.kv_heads, h.head_dim).transpose(1, 2) for _ in range(2))
        causal = h.causal and h.queries > 1
        rows = torch.randperm(h.queries, device=device)[:ROWS]
        exact = exact_attention(q, k, v, causal, rows)
        calls: dict[str, Call] = {
            "ours": lambda: K.attention(q, k, v, causal=causal, impl=impl_on(q)),
            "default": lambda: F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=h.heads != h.kv_heads
            ),
        }
        if device.type == "cuda":
            calls["cudnn"] = by_backend(SDPBackend.CUDNN_ATTENTION, q, k, v, causal)
            calls["flash"] = by_backend(SDPBackend.FLASH_ATTENTION, q, k, v, causal)
            if h.flex:
                calls["flex"] = flex(q, k, v, causal)
        return Sides(calls, lambda out: relative(out[:, :, rows], exact))

    return sides


def attention(name: str, goal: str, h: Heads, against: str = "best") -> Case:
    size = (h.queries * h.keys, h.head_dim)
    return Case(name, goal, against, attention_sides(h), h.flops(), h.least_bytes(), h.flex, "attention", size)


LENGTHS = (2048, 4096, 8192, 16384)
ATTENTION: tuple[Case, ...] = (
    *(attention(f"d128-{n}", "G1", Heads(1, 16, 16, n, n, 128, flex=n == 4096)) for n in LENGTHS),
    *(attention(f"d64-{n}", "G2", Heads(1, 32, 32, n, n, 64, flex=n == 4096)) for n in LENGTHS),
    attention("flux", "G3", Heads(1, 24, 24, 4608, 4608, 128), "default"),
    attention("sdxl-cross-64", "G4", Heads(2, 10, 10, 4096, 77, 64)),
    attention("sdxl-cross-32", "G4", Heads(2, 20, 20, 1024, 77, 64)),
    attention("sdxl-self-64", "", Heads(2, 10, 10, 4096, 4096, 64)),
    attention("sdxl-self-32", "", Heads(2, 20, 20, 1024, 1024, 64)),
    attention("sd15-self-64", "", Heads(2, 8, 8, 4096, 4096, 40)),
    attention("sd15-self-32", "", Heads(2, 8, 8, 1024, 1024, 80)),
    attention("sd15-self-16", "", Heads(2, 8, 8, 256, 256, 160)),
    attention("sd15-cross-64", "", Heads(2, 8, 8, 4096, 77, 40)),
    attention("sd35", "", Heads(2, 24, 24, 4250, 4250, 64)),
    attention("dit-xl-256", "", Heads(2, 16, 16, 256, 256, 72)),
    attention("vae-mid-64", "", Heads(1, 1, 1, 4096, 4096, 512)),
    attention("clip", "", Heads(2, 12, 12, 77, 77, 64, causal=True)),
    attention("llama-prefill", "", Heads(1, 32, 8, 4096, 4096, 128, causal=True)),
    attention("llama-decode", "", Heads(1, 32, 8, 1, 4096, 128)),
)

# --- norms -----------------------------------------------------------------------------------------------------------


def impl_on(x: Tensor) -> Literal["triton", "reference"]:
    return "triton" if x.is_cuda else "reference"


@dataclass(frozen=True)
class Norm:
    """A norm over [batch, tokens, channels]: RMS or layer, with a gated residual before and a modulation after."""

    rms: bool = False
    residual: bool = False
    modulated: bool = False

    def eager(self, x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Any:
        total = residual + gate[:, None] * x if self.residual else x
        last = x.shape[-1:]
        y = F.rms_norm(total, last, weight, 1e-6) if self.rms else F.layer_norm(total, last, weight, None, 1e-6)
        y = y * (1 + scale[:, None]) + shift[:, None] if self.modulated else y
        return (y, total) if self.residual else y

    def ours(
        self, impl: str, x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor
    ) -> Any:
        words: dict[str, Any] = {"impl": impl, "eps": 1e-6}
        words |= {"residual": residual, "gate": gate} if self.residual else {}
        words |= {"scale": scale, "shift": shift} if self.modulated else {}
        return K.rms_norm(x, weight, **words) if self.rms else K.layer_norm(x, weight, **words)

    @property
    def operation(self) -> str:
        return ("add_" if self.residual else "") + ("rms_norm" if self.rms else "layer_norm")

    def passes(self) -> int:
        return 4 if self.residual else 2


def norm_sides(norm: Norm, batch: int, tokens: int, channels: int) -> Callable[[torch.device], Sides]:
    def sides(device: torch.device) -> Sides:
        x, residual = (drawn(device, batch, tokens, channels) for _ in range(2))
        vectors = [drawn(device, batch, channels) for _ in range(3)]
        weight = drawn(device, channels)
        feeds = (x, residual, *vectors, weight)
        rows = slice(0, min(tokens, ROWS))
        exact = first(norm.eager(*(t[:, rows].double() for t in feeds[:2]), *(t.double() for t in feeds[2:])))
        calls: dict[str, Call] = {"ours": lambda: norm.ours(impl_on(x), *feeds), "eager": lambda: norm.eager(*feeds)}
        if device.type == "cuda":
            calls["reference"] = lambda: norm.ours("reference", *feeds)
            torch._dynamo.reset()  # beyond eight shapes of one function it would run eagerly
            compiled: Any = torch.compile(norm.eager, dynamic=False, fullgraph=True)
            calls["torch.compile"] = lambda: compiled(*feeds)
        return Sides(calls, lambda out: relative(first(out)[:, rows], exact))

    return sides


def first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


NORMS: Mapping[str, Norm] = {
    "layer-norm": Norm(),
    "rms-norm": Norm(rms=True),
    "ada-ln": Norm(modulated=True),
    "add-layer-norm": Norm(residual=True),
    "gate-add-ada-ln": Norm(residual=True, modulated=True),
}
SIZES: Mapping[str, tuple[str, tuple[int, int, int]]] = {
    "flux-batch-4": ("G5", (4, 4608, 3072)),  # 113 MB
    "flux": ("G6", (1, 4608, 3072)),  # 28 MB
    "sd35": ("G6", (1, 4250, 1536)),  # 13 MB
}


def norm_case(name: str, norm: Norm, size: str) -> Case:
    goal, shape = SIZES[size]
    least = norm.passes() * 2 * shape[0] * shape[1] * shape[2]
    batch, tokens, channels = shape
    work = (batch * tokens * channels, channels)
    sides = norm_sides(norm, *shape)
    return Case(
        f"{name}-{size}", goal, "copy", sides, least_bytes=least, slow=True, operation=norm.operation, size=work
    )


NORM_CASES = tuple(norm_case(n, norm, size) for (n, norm), size in itertools.product(NORMS.items(), SIZES))


def group_norm_sides(shape: tuple[int, int, int, int], channels_last: bool) -> Callable[[torch.device], Sides]:
    def sides(device: torch.device) -> Sides:
        x = drawn(device, *shape, dtype=torch.float16)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        weight, bias = (drawn(device, shape[1], dtype=torch.float16) for _ in range(2))

        def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.silu(F.group_norm(x, 32, weight, bias, 1e-6))

        group = shape[1] // 32  # one group is compared: all of its positions count
        exact = F.silu(F.group_norm(x[:, :group].double(), 1, weight[:group].double(), bias[:group].double(), 1e-6))
        calls: dict[str, Call] = {
            "ours": lambda: K.group_norm(x, 32, weight, bias, 1e-6, activation="silu", impl=impl_on(x)),
            "eager": lambda: eager(x, weight, bias),
        }
        if device.type == "cuda":
            calls["reference"] = lambda: K.group_norm(x, 32, weight, bias, 1e-6, activation="silu", impl="reference")
        return Sides(calls, lambda out: relative(out[:, :group], exact))

    return sides


VAE_SHAPES = ((1, 128, 1024, 1024), (1, 256, 512, 512), (1, 512, 256, 256), (1, 512, 128, 128))


def group_norm_case(shape: tuple[int, int, int, int], channels_last: bool) -> Case:
    name = f"vae-{shape[1]}x{shape[2]}{'-channels-last' if channels_last else ''}"
    least = 2 * 2 * shape[0] * shape[1] * shape[2] * shape[3]
    sides, numbers = group_norm_sides(shape, channels_last), shape[0] * shape[1] * shape[2] * shape[3]
    size = (numbers, numbers // shape[0] // 32)
    return Case(name, "G7", "eager", sides, least_bytes=least, operation="group_norm", size=size)


GROUP_NORMS = tuple(group_norm_case(s, last) for s in VAE_SHAPES for last in (False, True))

# --- a whole block ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A DiT block with AdaLN-zero (Peebles and Xie 2023, section 3.2), its norms in torch's words or in ours."""

    def __init__(self, width: int, heads: int, ours: bool) -> None:
        super().__init__()
        self.heads, self.ours = heads, ours
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, -1)
        last, impl = x.shape[-1:], impl_on(x)
        if self.ours:
            y = K.layer_norm(x, eps=1e-6, scale=scale, shift=shift, impl=impl)
        else:
            y = F.layer_norm(x, last, eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        a = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.ours:
            y, x = K.layer_norm(a, eps=1e-6, residual=x, gate=gate, scale=scale2, shift=shift2, impl=impl)
        else:
            x = x + gate[:, None] * a
            y = F.layer_norm(x, last, eps=1e-6) * (1 + scale2[:, None]) + shift2[:, None]
        y = self.down(F.gelu(self.up(y), approximate="tanh"))
        out: Tensor = x + gate2[:, None] * y
        return out


def block_sides(width: int, heads: int, batch: int, tokens: int) -> Callable[[torch.device], Sides]:
    def sides(device: torch.device) -> Sides:
        ours, plain = (Block(width, heads, ours=o).to(device, torch.bfloat16).eval() for o in (True, False))
        plain.load_state_dict(ours.state_dict())
        x, condition = drawn(device, batch, tokens, width), drawn(device, batch, width)
        exact = plain.double()(x.double(), condition.double())
        plain = plain.to(torch.bfloat16)
        mode = {"mode": "max-autotune-no-cudagraphs"} if device.type == "cuda" else {"backend": "aot_eager"}
        fast: Any = [torch.compile(m, dynamic=False, **mode) for m in (ours, plain)]  # type: ignore[call-overload]
        calls: dict[str, Call] = {
            "ours": lambda: fast[0](x, condition),
            "torch.compile": lambda: fast[1](x, condition),
            "eager": lambda: plain(x, condition),
        }
        return Sides(calls, lambda out: relative(out, exact))

    return sides


BLOCKS = (
    Case("dit-xl-block", "G8", "torch.compile", block_sides(1152, 16, 8, 256), slow=True),
    Case("flux-like-block", "G8", "torch.compile", block_sides(3072, 24, 1, 4608), slow=True),
)
TINY = (
    attention("tiny-attention", "", Heads(1, 4, 2, 63, 77, 40)),
    Case(
        "tiny-norm", "", "eager", norm_sides(Norm(residual=True, modulated=True), 2, 7, 72), least_bytes=8 * 7 * 72 * 2
    ),
    Case("tiny-group-norm", "", "eager", group_norm_sides((1, 64, 7, 9), channels_last=True)),
)
FAMILIES: Mapping[str, Sequence[Case]] = {
    "attention": ATTENTION,
    "norms": NORM_CASES,
    "group-norms": GROUP_NORMS,
    "blocks": BLOCKS,
    "tiny": TINY,
}
