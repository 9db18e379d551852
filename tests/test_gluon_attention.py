"""The Gluon kernel for sm_90: it compiles into what the GPU has; on such a GPU it is right."""

import dataclasses
import re

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from optimize.kernels import aot, gluon_attention, triton_attention
from optimize.kernels.kernel import LIMITS, Compiled
from optimize.kernels.triton_attention import KERNEL, AttentionProblem


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("head_dim", "block_n", "stages"), [(64, 128, 3), (128, 128, 2)])
def test_it_compiles_for_sm_90(head_dim: int, block_n: int, stages: int, causal: bool, parts: int) -> None:
    constants = gluon_attention.meta(head_dim, 4, causal, (128, block_n), stages, parts)
    code = Compiled(gluon_attention.signature("bf16", constants), constants, 8 // parts, 1, ("out",))
    binary = aot.compiled_for(gluon_attention.gluon_attention_kernel, code, 90)
    taken = aot.resources(binary.asm["cubin"])
    assert taken["spill_bytes"] == 0
    assert binary.metadata.shared <= LIMITS[90].shared_bytes
    assert taken["registers"] * 32 * binary.metadata.num_warps <= LIMITS[90].registers_per_block
    assert binary.metadata.global_scratch_size == 0
    ptx = binary.asm["ptx"]
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor.4d" in ptx
    asked = [int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)]
    assert 240 in asked and 24 in asked  # the registers move from the fetching warp to the others


def test_no_heuristic_takes_it_and_the_space_offers_it_on_sm_90_alone() -> None:
    problem = AttentionProblem(128, "bf16", 4096, 4096)
    assert KERNEL.heuristic(problem, 90).parts == 0
    offered = [c for c in KERNEL.space(problem, 90) if c.parts and KERNEL.prune(problem, c, 90) is None]
    assert offered
    assert all(KERNEL.prune(problem, c, sm) for c in offered for sm in (80, 89, 100, 120))
    for change in ({"head_dim": 80}, {"dtype": "fp32"}, {"bias": "bool"}, {"unit": 4}):
        assert all("Gluon" in (KERNEL.prune(dataclasses.replace(problem, **change), c, 90) or "") for c in offered)


def test_what_the_copying_hardware_cannot_walk_is_declined() -> None:
    whole = torch.zeros(1, 2, 64, 72, dtype=torch.float16)
    assert gluon_attention.described(whole[..., :64], 64) is not None
    assert gluon_attention.described(whole[..., 1:65], 64) is None  # not at a multiple of 16 bytes
    assert gluon_attention.described(whole[:, :1].expand(1, 4, 64, 72)[..., :64], 64) is None
    assert gluon_attention.described(whole.transpose(2, 3), 64) is None
    odd = torch.zeros(1, 2, 64, 65, dtype=torch.float16)[..., :64]
    assert gluon_attention.described(odd, 64) is None


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of sm_90"
)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(128, 128), (1, 77), (199, 1128), (1128, 1128), (4096, 4096)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_is_right(head_dim: int, queries: int, keys: int, causal: bool, parts: int) -> None:
    """Against float64, within twice the error of the plain kernel; the output poisoned first."""
    torch.manual_seed(0)
    q = torch.randn(2, queries, 4, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(2, keys, 2, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    scale = head_dim**-0.5
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * scale
    if causal:
        last = torch.arange(queries, device="cuda")[:, None] + keys - queries
        scores = scores.masked_fill(torch.arange(keys, device="cuda") > last, -torch.inf)
    exact = scores.softmax(-1) @ v.double().repeat_interleave(2, 1)
    plain = triton_attention.launch(q, k, v, None, causal, scale)
    for block_n, stages in ((64, 2), (128, 2)):
        out = torch.full_like(plain, torch.nan)
        assert gluon_attention.launch(q, k, v, out, causal, scale, (128, block_n), stages, parts)
        assert (out - exact).norm() <= 2 * (plain - exact).norm()
