"""fuse and unfuse on every public architecture: what is found is what runs, what comes out is what came out before."""

import copy
import json
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from optimize.compile.architectures import ARCHITECTURES
from optimize.compile.feeds import feeds_for
from optimize.compile.runners import loaded_module
from optimize.compile.sources import components_of_architecture
from optimize.compile.trace import fused, trace_component
from optimize.errors import InputError
from optimize.kernels import fuse, unfuse

NAMES = [name for name in ARCHITECTURES if name != "stylegan2"]  # it has no norm and no attention
TWINS = {"sd21-unet", "sdxl-refiner-unet", "controlnet-sdxl", "flux-schnell-transformer"}
TWINS |= {"vae-sd21", "vae-sdxl", "vae-flux", "openclip-h", "clip-l-projection"}  # classes and layers of another row
NORMS = {"layer_norm", "rms_norm", "group_norm"}
U_NET = {"attention", "group_norm", "layer_norm", "residual+norm", "geglu"}
DIT = {"attention", "layer_norm", "modulation", "residual+norm"}
ENCODER = {"attention", "layer_norm", "residual+norm"}
KINDS = {
    "UNet2DConditionModel": U_NET,
    "ControlNetModel": U_NET,
    "UNet2DModel": {"attention", "group_norm"},
    "AutoencoderKL": {"attention", "group_norm"},
    "SD3Transformer2DModel": {*DIT, "rms_norm", "qk_norm_rope"},
    "FluxTransformer2DModel": {*DIT, "rms_norm", "qk_norm_rope"},
    "PixArtTransformer2DModel": DIT,
    "DiTTransformer2DModel": DIT,
    "CLIPTextModel": ENCODER,
    "CLIPTextModelWithProjection": ENCODER,
    "BertModel": ENCODER,
    "ViTModel": ENCODER,
    "GPT2LMHeadModel": ENCODER,
    "T5EncoderModel": {"attention", "rms_norm", "geglu"},
    "LlamaForCausalLM": {"attention", "rms_norm", "residual+norm", "qk_norm_rope", "swiglu"},
}
GATED = {"GEGLU": "geglu", "T5DenseGatedActDense": "geglu", "LlamaMLP": "swiglu"}


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def component(name, part=-1):
    return list(components_of_architecture(f"{name}@tiny"))[part]


def feeds_of(c, precision="fp32"):
    """At sizes that are no powers of two. Numbers that FLUX multiplies by 1000 are ones that bf16 has whole."""
    feeds = feeds_for(c.inputs, c.shape_sets()["untraced"], precision)
    if c.class_name == "FluxTransformer2DModel":
        feeds["timestep"] = torch.full_like(feeds["timestep"], 0.5)
        if "guidance" in feeds:
            feeds["guidance"] = torch.full_like(feeds["guidance"], 4.0)
    return [feeds[t.name] for t in c.inputs]


def errors(found, expected):
    return [((a.float() - b).norm() / b.norm().clamp(min=1e-20)).item() for a, b in zip(found, expected, strict=True)]


def state_of(module):
    """Class, forward and instance dict of everything in it, dicts in dicts by their entries."""
    return [
        (type(m), m.forward, {k: dict(v) if isinstance(v, dict) else v for k, v in m.__dict__.items()})
        for m in module.modules()
    ]


class Calls(TorchFunctionMode):
    """How often the functions that kernels can stand for are called. An RMS norm that is written out has one rsqrt."""

    KINDS = {  # noqa: RUF012
        F.scaled_dot_product_attention: "attention",
        F.layer_norm: "layer_norm",
        F.group_norm: "group_norm",
        F.rms_norm: "rms_norm",
        torch.rsqrt: "rms_norm",
    }

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.KINDS:
            self.counts[self.KINDS[func]] += 1
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Which of our operators run, and how often; and what is left of torch's."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = str(func).partition(".")
        if namespace == "optimize" or any(word in name for word in ("_norm", "attention", "rsqrt")):
            self.counts[f"{namespace}.{name.split('.')[0]}"] += 1
        return func(*args, **(kwargs or {}))


def expected_operators(report):
    """From the report alone: each norm or attention is one call; both norms of a q and a k are one."""
    counts = Counter()
    for site in report.sites:
        if site.kind in NORMS:
            counts[f"optimize.{site.into.split('+')[0]}"] += 0.5 if site.into == "qk_norm_rope" else 1
        elif site.kind in ("attention", "geglu", "swiglu"):
            counts[f"optimize.{site.into}"] += 1
    if not any(site.kind == "rms_norm" and site.into == "qk_norm_rope" for site in report.sites):
        counts["optimize.qk_norm_rope"] = report.counts.get("qk_norm_rope", {}).get("fused", 0)
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_what_is_found_is_what_runs_and_unfuse_brings_all_back(name):
    called, ran, report = Counter(), Counter(), None
    for c in components_of_architecture(f"{name}@tiny"):
        module, inputs = loaded_module(c, "fp32"), feeds_of(c)
        with Calls() as calls:
            before = module(*inputs)
        keys, state = list(module.state_dict()), state_of(module)  # transformers hangs hooks on it in the first call
        adapter = module.__dict__.pop("forward")
        report = fuse(module)
        module.__dict__["forward"] = adapter
        assert list(module.state_dict()) == keys
        with Operators() as operators:
            after = module(*inputs)
        assert max(errors(after, before)) <= 1e-5
        called.update(calls.counts)
        ran.update(operators.counts)

        unfuse(module)
        assert state_of(module) == state
        assert all(torch.equal(a, b) for a, b in zip(module(*inputs), before, strict=True))

    counts = report.counts
    assert {k: counts[k]["found"] for k in counts if k in NORMS | {"attention"}} == dict(called)
    gates = Counter(GATED[n] for n in (type(m).__name__ for m in module.modules()) if n in GATED)
    assert {k: counts[k]["found"] for k in ("geglu", "swiglu") if k in counts} == dict(gates)
    assert KINDS[ARCHITECTURES[name].class_name] == {kind for kind in counts if counts[kind]["fused"]}
    assert not {site.kind for site in report.declined} & (NORMS | {"attention"})
    assert all(site.why for site in report.declined)
    expected = expected_operators(report)
    # SD3.5's first blocks modulate one norm twice, and compute it twice
    expected["optimize.layer_norm"] += sum(type(m).__name__ == "SD35AdaLayerNormZeroX" for m in module.modules())
    assert ran == {k: v for k, v in expected.items() if v}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TWINS])
def test_bf16_stays_within_the_error_budget(name):
    """Against fp32 on the same inputs, no further off than torch's own bf16, and of the same types."""
    for c in components_of_architecture(f"{name}@tiny"):
        low, inputs = loaded_module(c, "bf16"), feeds_of(c, "bf16")
        exact = loaded_module(c, "fp32")(*[t.float() if t.dtype == torch.bfloat16 else t for t in inputs])
        before = low(*inputs)
        fused(low)
        after = low(*inputs)
        assert [t.dtype for t in after] == [t.dtype for t in before]
        for mine, theirs in zip(errors(after, exact), errors(before, exact), strict=True):
            assert theirs < 0.1, "too coarse to tell anything"
            assert mine <= 1.2 * theirs + 1e-6


def test_fp16_t5_with_its_fp32_part_keeps_its_types():
    """`wo` stays fp32, so the sums are fp32 and the norms have to give fp16 again."""
    c = component("t5-xxl")
    module, inputs = loaded_module(c, "fp16"), feeds_of(c)
    before = module(*inputs)
    fuse(module)
    after = module(*inputs)
    assert [t.dtype for t in after] == [t.dtype for t in before]
    assert max(errors(after, [t.float() for t in before])) < 5e-3


@pytest.mark.parametrize("name", ["pixart-sigma-transformer", "flux-dev-transformer", "llama", "t5-xxl", "vae-sd15"])
def test_export_with_symbolic_sizes_holds_our_operators(name):
    """On meta, under the exporter's own mode: no leaf of a norm or an attention is left, and the batch may be 1."""
    c = replace(component(name), kernels=True)
    traced = trace_component(c, "fp16")
    targets = Counter(str(n.target) for n in traced.program.graph.nodes if n.op == "call_function")
    assert targets["optimize.attention.default"] > 0
    assert not [t for t in targets if t.startswith("leaf.") and ("norm" in t or "attention" in t)]
    plain = trace_component(replace(c, kernels=False), "fp16").program.range_constraints
    ranges = sorted((int(v.lower), int(v.upper)) for v in traced.program.range_constraints.values())
    assert ranges == sorted((int(v.lower), int(v.upper)) for v in plain.values())


class Holder(nn.Module):
    """The inputs' way to a model through a call that torch.compile can see."""

    def __init__(self, model, forward):
        super().__init__()
        self.model, self.call = model, forward

    def forward(self, *inputs):
        return self.call(self.model, *inputs)


def held(name):
    from optimize.compile.adapters import adapters_for

    c = component(name)
    module = loaded_module(c, "fp32")
    del module.__dict__["forward"]
    return Holder(module, adapters_for(c.class_name)[-1].forward).eval(), feeds_of(c)


@pytest.mark.parametrize("name", ["clip-l", "llama", "flux-dev-transformer", "vae-sd15"])
def test_compiles_as_one_graph_that_holds_our_operators(name):
    holder, inputs = held(name)
    before = holder(*inputs)
    fuse(holder)
    seen = []

    def backend(graph, example_inputs):
        seen.append(Counter(str(n.target).split(".")[0] for n in graph.graph.nodes if n.op == "call_function"))
        return graph.forward

    torch._dynamo.reset()
    after = torch.compile(holder, fullgraph=True, backend=backend)(*inputs)
    assert len(seen) == 1 and seen[0]["optimize"] > 0
    assert max(errors(after, before)) <= 1e-5


def test_compiles_to_code():
    holder, inputs = held("clip-l")
    before = holder(*inputs)
    fuse(holder)
    torch._dynamo.reset()
    assert max(errors(torch.compile(holder, fullgraph=True)(*inputs), before)) <= 1e-5


# --- one rule at a time ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """What the tests below vary."""

    def __init__(self):
        super().__init__()
        self.norm, self.then, self.proj = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.active, self.act = True, nn.SiLU()


class NormIsReadAgain(Block):
    def forward(self, x, s, t):
        n = self.norm(x)
        y = n * (1 + s) + t
        return y + n


class SumIsChanged(Block):
    def forward(self, x, s, t):
        x = x + self.proj(x)
        if x.ndim == 3:
            x = x + t
        x = self.norm(x)
        return x


class GateIsReadAgain(Block):
    def forward(self, x, s, t):
        gate = s
        y = self.proj(x)
        y = gate * y
        x = x + y
        n = self.norm(x)
        return n + y + x


class GatedSum(Block):
    def forward(self, x, s, t):
        gate = s
        y = self.proj(x)
        y = y * gate
        x = y + x
        if x.ndim == 4:
            x = x.squeeze(1)
        n = self.norm(x)
        n = n * (1 + t) + s
        return n + x


class InputChangesBetween(Block):
    def forward(self, x, s, t):
        n = self.norm(x)
        s = s + n
        n = n * (1 + s) + t
        return n + x


class LoopReadsOn(Block):
    def forward(self, x, s, t):
        kept = x
        for _ in range(3):
            x = x + kept
            kept = self.norm(x)
            y = kept * (1 + s) + t
            x = x + y
        return x


class OnePlusWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(6)), 1e-6

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (1 + self.weight) * hidden_states.to(input_dtype)


class OfAnotherNorm(Block):
    def __init__(self):
        super().__init__()
        self.norm = OnePlusWeightNorm()

    def forward(self, x, s, t):
        return self.norm(x) * (1 + s) + t


class Switched(Block):
    def forward(self, x, s, t):
        if self.training:
            return x
        if self.active and s is not None:
            x = self.norm(x)
            x = x * (1 + s) + t
        return self.act(self.proj(x)) * x


@pytest.mark.parametrize(
    "cls",
    [
        NormIsReadAgain,
        SumIsChanged,
        GateIsReadAgain,
        GatedSum,
        InputChangesBetween,
        LoopReadsOn,
        OfAnotherNorm,
        Switched,
    ],
)
def test_a_rewritten_forward_computes_what_it_did(cls):
    torch.manual_seed(0)
    block = cls().eval()
    for parameter in block.parameters():
        parameter.copy_(torch.randn_like(parameter))
    inputs = torch.randn(2, 5, 6), torch.randn(2, 1, 6), torch.randn(2, 1, 6)
    before = block(*inputs)
    fuse(block)
    torch.testing.assert_close(block(*inputs), before, rtol=1e-5, atol=1e-5)


def test_what_a_rule_needs_is_looked_at():
    """The names that are read again keep their statements: nothing is taken that would change them."""

    def kinds(cls):
        return {site.kind for site in fuse(cls().eval()).sites if site.into}

    assert kinds(NormIsReadAgain) == {"layer_norm"}
    assert "modulation" not in kinds(InputChangesBetween)
    assert kinds(Switched) == {"layer_norm", "modulation", "swiglu"}
    (site,) = [s for s in fuse(GateIsReadAgain().eval()).sites if s.kind == "residual+norm"]
    assert site.into == "add_layer_norm"  # without the gate
    (site,) = [s for s in fuse(GatedSum().eval()).sites if s.kind == "residual+norm"]
    assert site.into == "add_layer_norm+gate+modulation"
    (site,) = [s for s in fuse(OfAnotherNorm().eval()).sites if s.path == "norm"]
    assert "OnePlusWeightNorm" in site.why


# --- what is declined ------------------------------------------------------------------------------------------------


def only(report, path):
    return next(site for site in report.sites if site.path == path)


def test_a_norm_with_hooks_is_called_as_a_module():
    block, x = Switched().eval(), torch.randn(2, 5, 6)
    calls = []
    block.norm.register_forward_hook(lambda *_: calls.append(1))
    report = fuse(block)
    block(x, x[:, :1], x[:, :1])
    assert calls == [1]
    assert only(report, "norm").into == "layer_norm"
    assert "modulation" not in report.counts


def test_a_forward_that_is_bound_to_the_instance_stays():
    block = Switched().eval()
    block.norm.forward = lambda x: x + 1
    report = fuse(block)
    assert "bound to the instance" in only(report, "norm").why
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(block.norm(x), x + 1)


def test_eager_attention_is_declined_with_what_it_needs():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**ARCHITECTURES["llama"].values(tiny=True), attn_implementation="eager")
    report = fuse(LlamaForCausalLM(config).eval())
    declined = [site for site in report.declined if site.kind == "attention"]
    assert len(declined) == 3 and all('needs "sdpa"' in site.why for site in declined)


def test_processors_without_a_known_call_are_declined_and_later_ones_are_called():
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    torch.manual_seed(0)
    levels = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "resnet_time_scale_shift": "scale_shift",
    }
    unet = UNet2DConditionModel.from_config({**ARCHITECTURES["sd15-unet"].values(tiny=True), **levels}).eval()
    count = Counter(type(module).__name__ for module in unet.modules())
    unet.set_attn_processor(AttnProcessor())
    declined = fuse(unet).declined
    attentions = [site for site in declined if site.kind == "attention"]
    assert len(attentions) == count["Attention"] == 8 and all(
        "AttnProcessor calls no attention function" in s.why for s in attentions
    )
    modulations = [site for site in declined if site.kind == "modulation"]
    assert len(modulations) == count["ResnetBlock2D"] and all("group norm" in site.why for site in modulations)

    unet.set_attn_processor(AttnProcessor2_0())
    assert fuse(unet).counts["attention"] == {"found": 8, "fused": 8}
    inputs = torch.randn(1, 4, 8, 16), torch.tensor([3.0]), torch.randn(1, 7, 32)
    with Operators() as operators:
        served = unet(*inputs).sample
    assert operators.counts["optimize.attention"] == 8
    unet.set_attn_processor(AttnProcessor())  # set after fuse: what was fused is not called in its place
    with Operators() as operators:
        own = unet(*inputs).sample
    assert operators.counts["optimize.attention"] == 0
    assert errors([served], [own])[0] < 1e-5


def test_dropout_in_training_is_refused_in_words():
    from transformers import BertConfig, BertModel

    config = BertConfig(**ARCHITECTURES["bert-base"].values(tiny=True), attn_implementation="sdpa")
    model = BertModel(config).eval()
    fuse(model)
    with pytest.raises(ValueError, match=r"dropout 0.1.*unfuse"):
        model.train()(torch.randint(0, 100, (1, 5)))


# --- the verbs -------------------------------------------------------------------------------------------------------


def test_fusing_twice_is_fusing_once():
    module = component("flux-dev-transformer").build()
    first = fuse(module)
    classes = [type(child) for child in module.modules()]
    assert fuse(module) == first
    assert [type(child) for child in module.modules()] == classes
    unfuse(module)
    assert all("_fused_recipe" not in vars(type(child)) for child in module.modules())


def test_a_copy_and_a_pickle_of_a_fused_module_are_fused_and_can_be_unfused():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel.from_config(ARCHITECTURES["flux-schnell-transformer"].values(tiny=True)).eval()
    block, inputs = model.transformer_blocks[0], (torch.randn(2, 5, 64), torch.randn(2, 3, 64), torch.randn(2, 64))
    before = block(*inputs)
    fuse(block)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        with Operators() as operators:
            after = twin(*inputs)
        assert operators.counts["optimize.attention"] == 1
        assert max(errors(after, before)) <= 1e-5
        unfuse(twin)
        with Operators() as operators:
            after = twin(*inputs)
        assert not [name for name in operators.counts if name.startswith("optimize")]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with Operators() as operators:  # the first one is still fused
        block(*inputs)
    assert operators.counts["optimize.attention"] == 1


def test_what_is_excluded_stays_with_all_that_is_in_it():
    module = component("sd15-unet").build()
    all_of = {(s.path, s.kind): s for s in fuse(module).sites}
    report = fuse(module, exclude=["mid_block", "down_blocks.*.norm2"])
    own = [path for path, child in module.named_modules() if "_fused_recipe" not in vars(type(child))]
    assert [site for site in report.sites if site.path.startswith("mid_block.")]
    for site in report.sites:
        inside = site.path.startswith("mid_block.")
        norm = site.path.startswith("down_blocks.") and site.path.endswith(".norm2")
        assert (not site.into and "excluded by" in site.why and site.path in own) == (inside or norm)
        assert inside or norm or site == all_of[site.path, site.kind]
    why = only(report, "down_blocks.0.attentions.0.transformer_blocks.0.norm2").why
    assert why == "excluded by 'down_blocks.*.norm2'"
    assert {(s.path, s.kind) for s in report.sites} <= set(all_of)


def test_a_norm_that_is_excluded_is_called_by_the_block_around_it():
    """The sum before it and the modulation after it stay the block's own."""
    torch.manual_seed(0)
    block, x = GatedSum().eval(), torch.randn(2, 5, 6)
    before = block(x, x[:, :1], x[:, :1])
    report = fuse(block, exclude=["norm"])
    assert [(s.path, s.kind, s.why) for s in report.sites] == [
        ("norm", "layer_norm", "excluded by 'norm'"),
        ("then", "layer_norm", ""),
    ]
    with Operators() as operators:
        assert torch.equal(block(x, x[:, :1], x[:, :1]), before)
    assert not [name for name in operators.counts if name.startswith("optimize")]


def test_a_pattern_that_excludes_nothing_is_refused():
    block = GatedSum().eval()
    with pytest.raises(InputError, match=r"no module has such a path\s+got: nrom\s+expected: one like norm"):
        fuse(block, exclude=["norm", "nrom"])
    assert type(block) is GatedSum
    with pytest.raises(TypeError, match="exclude: got the string 'norm', expected a list"):
        fuse(block, exclude="norm")


def test_impl_reaches_every_operation():
    from optimize.errors import MissingError
    from optimize.kernels.select import interpreting

    if torch.cuda.is_available() or interpreting():
        pytest.skip("needs a machine where Triton cannot run")
    block = Switched().eval()
    fuse(block, impl="triton")
    x = torch.randn(2, 5, 6)
    with pytest.raises(MissingError, match="cannot run here"):
        block(x, x[:, :1], x[:, :1])
    with pytest.raises(ValueError, match="impl: got 'fast'"):
        fuse(block, impl="fast")


def test_bad_modules_are_refused():
    with pytest.raises(TypeError, match=r"module: got Tensor, expected a torch.nn.Module"):
        fuse(torch.zeros(2))
    with pytest.raises(InputError, match=r"call module.eval\(\) first"):
        fuse(Block())


def test_the_report_reads_as_a_table_and_as_json():
    report = fuse(component("bert-base").build())
    text, data = str(report), json.loads(json.dumps(report.as_dict()))
    assert "encoder.layer.0.attention.self" in text and "declined: embeddings are summed" in text
    assert data["counts"]["residual+norm"] == {"found": 7, "fused": 6}
    assert data["into"]["layer_norm -> add_layer_norm"] == 6
    assert data["declined"][0]["path"] == "embeddings.LayerNorm"
    assert len(report.rows()) == len(text.splitlines()) - 1


def test_the_rewritten_source_can_be_read():
    import inspect

    module = component("flux-dev-transformer").build()
    fuse(module)
    assert "_fused.add_norm(" in inspect.getsource(type(module.transformer_blocks[0]).forward)
