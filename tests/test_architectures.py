"""The table of public architectures: sizes against the published counts, tiny twins that keep the structure, and
pipelines whose parts fit. Also the StyleGAN2 generator, which is our own."""

import inspect
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from optimize.compile.architectures import ARCHITECTURES, PIPELINES, Architecture

# Parameters of the published weights, to the last one: as public logs, tests and model cards give them.
PUBLISHED = {
    "sd15-unet": 859_520_964,
    "sd21-unet": 865_910_724,
    "sdxl-base-unet": 2_567_463_684,
    "sdxl-refiner-unet": 2_259_526_660,
    "controlnet-sd15": 361_279_120,
    "controlnet-sdxl": 1_251_014_160,
    "ddpm-cifar10": 35_746_307,
    "sd35-medium-transformer": 2_469_663_936 - 384 * 384 * 1536,  # the file holds the positions, a buffer, as well
    "flux-dev-transformer": 11_901_408_320,
    "flux-schnell-transformer": 11_891_178_560,
    "pixart-sigma-transformer": 610_856_096,
    "vae-sd15": 83_653_863,
    "vae-sd21": 83_653_863,
    "vae-sdxl": 83_653_863,
    "vae-sd3": 83_819_683,
    "vae-flux": 83_819_683,
    "clip-l": 123_060_480,
    "clip-l-projection": 123_650_304,
    "openclip-h": 340_387_840,
    "openclip-bigg": 694_659_840,
    "t5-xxl": 4_762_310_656,
    "bert-base": 109_482_240,
    "vit-b16": 86_389_248,
    "gpt2": 124_439_808,
    "llama": 1_100_048_384,
}
# What this code counts, where no such figure was found: each has a test of its own below.
COMPUTED = {"dit-xl-2-256": 749_826_464, "stylegan2": 24_767_458}


def module_of(entry: Architecture, tiny: bool) -> torch.nn.Module:
    values = entry.values(tiny)
    if entry.library == "diffusers":
        import diffusers

        return getattr(diffusers, entry.class_name).from_config(values)
    if entry.library == "transformers":
        import transformers

        cls = getattr(transformers, entry.class_name)
        return cls(cls.config_class(**values, attn_implementation="sdpa"))
    from optimize.compile import stylegan

    return getattr(stylegan, entry.class_name)(**values)


@pytest.fixture(scope="module")
def big():
    """Each network at full size, without storage."""
    with torch.device("meta"):
        return {name: module_of(entry, tiny=False) for name, entry in ARCHITECTURES.items()}


@pytest.fixture(scope="module")
def small():
    """Each tiny network, with random weights."""
    torch.manual_seed(0)
    return {name: module_of(entry, tiny=True).eval() for name, entry in ARCHITECTURES.items()}


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_reading_the_table_imports_nothing_heavy():
    code = (
        "import sys, optimize.compile.architectures\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'onnx') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_names():
    wanted = {
        "sd15",
        "sd21",
        "sdxl-base",
        "sdxl-refiner",
        "sd35-medium",
        "flux-dev",
        "flux-schnell",
        "pixart-sigma",
        "dit-xl-2-256",
        "controlnet-sd15",
        "controlnet-sdxl",
        "vae-sd15",
        "vae-sdxl",
        "vae-sd3",
        "vae-flux",
        "clip-l",
        "openclip-bigg",
        "t5-xxl",
        "bert-base",
        "vit-b16",
        "ddpm-cifar10",
        "gpt2",
        "llama",
        "stylegan2",
    }
    assert wanted <= ARCHITECTURES.keys() | PIPELINES.keys()
    assert not ARCHITECTURES.keys() & PIPELINES.keys()  # a name means one thing
    assert PUBLISHED.keys() | COMPUTED.keys() == ARCHITECTURES.keys()
    assert {key for parts in PIPELINES.values() for key in parts.values()} <= ARCHITECTURES.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_count_is_the_published_one(big, name):
    assert size(big[name]) == {**PUBLISHED, **COMPUTED}[name]


def test_dit_has_the_published_count_without_the_copies_that_diffusers_makes(big):
    """One timestep and label embedder in the original, one per block in diffusers; the positions are a buffer here."""
    blocks = big["dit-xl-2-256"].transformer_blocks
    copies = sum(size(block.norm1.emb) for block in blocks[1:])
    assert size(big["dit-xl-2-256"]) - copies + 256 * 1152 == 675_129_632


def test_stylegan_has_the_layers_of_the_public_generator(big):
    """Channels of cfg=paper256: at most 512, 16384 / size; two layers a block, one in the first, a toRGB each."""

    def layer(inputs, outputs, kernel=3):
        return (512 + 1) * inputs + outputs * inputs * kernel**2 + outputs  # affine, weight, bias

    channels = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64}
    total = 8 * (512 + 1) * 512 + 512 * 4 * 4  # mapping network and constant
    for size_, outputs in channels.items():
        total += layer(outputs, outputs) + 1 + layer(outputs, 3, 1)  # 1: the strength of the noise
        total += layer(channels[size_ // 2], outputs) + 1 if size_ > 4 else 0
    assert size(big["stylegan2"]) == total


# what transformers 5 makes of a value: T5 drops it in its encoder, or forces it; llama moves it into another
REWRITTEN = {"t5-xxl": {"is_encoder_decoder", "tie_word_embeddings"}, "llama": {"rope_theta"}}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_value_is_one_that_the_class_knows(big, name):
    """A misspelt key would be dropped without a word, and the default taken."""
    entry, module = ARCHITECTURES[name], big[name]
    assert entry.tiny.keys() <= entry.config.keys() | {"norm_num_groups"}
    if entry.library == "transformers":
        values = {k: v for k, v in entry.config.items() if k not in REWRITTEN.get(name, ())}
        assert values.keys() <= type(module).config_class().to_dict().keys()
        got = module.config.to_dict()
        assert {k: got[k] for k in values} == values
    else:
        assert entry.values(tiny=True).keys() <= inspect.signature(type(module).__init__).parameters.keys()


def test_llama_rotates_as_published(big):
    assert big["llama"].config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiny_is_small_and_keeps_every_kind_of_layer(big, small, name):
    assert size(small[name]) < 2_000_000
    kinds = [
        {
            (type(m).__name__, bool(getattr(m, "affine", 0)), getattr(m, "bias", None) is not None)
            for m in module.modules()
        }
        for module in (big[name], small[name])
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiny_has_each_block_at_least_twice_when_the_big_one_has(big, small, name):
    def repeated(module):
        return {kind for kind, n in Counter(type(m).__name__ for m in module.modules()).items() if n > 1}

    assert repeated(big[name]) == repeated(small[name])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiny_heads_are_real_heads(small, name):
    """At least 8 wide, and a multiple of 8: fused attention takes no others."""
    widths = {m.head_dim for m in small[name].modules() if isinstance(getattr(m, "head_dim", None), int)}
    widths |= {m.inner_dim // m.heads for m in small[name].modules() if hasattr(m, "inner_dim") and hasattr(m, "heads")}
    assert all(w >= 8 and w % 8 == 0 for w in widths)


# --- one forward of each tiny network --------------------------------------------------------------------------------


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def words(vocabulary: int, *shape: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def unet_feeds(c: dict) -> dict:
    added = None
    if c.get("addition_embed_type"):
        ids = 5 if c["projection_class_embeddings_input_dim"] - 5 * 8 == c["cross_attention_dim"] else 6
        added = {
            "text_embeds": normal(2, c["projection_class_embeddings_input_dim"] - 8 * ids),
            "time_ids": normal(2, ids),
        }
    return {
        "sample": normal(2, 4, 16, 24),
        "timestep": torch.tensor([10.0, 900.0]),
        "encoder_hidden_states": normal(2, 7, c["cross_attention_dim"]),
        "added_cond_kwargs": added,
    }


FEEDS = {
    "UNet2DConditionModel": unet_feeds,
    "ControlNetModel": lambda c: {**unet_feeds(c), "controlnet_cond": normal(2, 3, 128, 192)},
    "UNet2DModel": lambda c: {"sample": normal(2, 3, 32, 24), "timestep": torch.tensor([10.0, 900.0])},
    "SD3Transformer2DModel": lambda c: {
        "hidden_states": normal(2, 16, 16, 24),
        "encoder_hidden_states": normal(2, 7, c["joint_attention_dim"]),
        "pooled_projections": normal(2, c["pooled_projection_dim"]),
        "timestep": torch.tensor([10.0, 900.0]),
    },
    "FluxTransformer2DModel": lambda c: {
        "hidden_states": normal(2, 20, c["in_channels"]),
        "timestep": torch.tensor([0.1, 0.9]),
        "encoder_hidden_states": normal(2, 7, c["joint_attention_dim"]),
        "txt_ids": torch.zeros(7, 3),
        "pooled_projections": normal(2, c["pooled_projection_dim"]),
        "img_ids": torch.arange(60.0).reshape(20, 3),
        "guidance": torch.tensor([3.5, 3.5]) if c["guidance_embeds"] else None,
    },
    "PixArtTransformer2DModel": lambda c: {
        "hidden_states": normal(2, 4, 16, 24),
        "encoder_hidden_states": normal(2, 7, c["caption_channels"]),
        "timestep": torch.tensor([10.0, 900.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
    "DiTTransformer2DModel": lambda c: {
        "hidden_states": normal(2, 4, 16, 16),
        "timestep": torch.tensor([10, 900]),
        "class_labels": torch.tensor([1, c["num_embeds_ada_norm"] - 1]),
    },
    "AutoencoderKL": lambda c: {"sample": normal(2, 3, 64, 96)},
    "ViTModel": lambda c: {"pixel_values": normal(2, 3, c["image_size"], c["image_size"])},
    "StyleGAN2Generator": lambda c: {"z": normal(2, c["z_dim"])},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiny_runs_and_its_rows_do_not_mix(small, name):
    """Two different rows of a batch, then the same rows the other way round: the outputs change places."""
    entry = ARCHITECTURES[name]
    config = entry.values(tiny=True)
    feeds = FEEDS.get(entry.class_name, lambda c: {"input_ids": words(c["vocab_size"], 2, 9)})(config)

    def swapped(value):
        if isinstance(value, dict):
            return {k: swapped(v) for k, v in value.items()}
        return value.flip(0) if isinstance(value, torch.Tensor) and value.shape[0] == 2 else value

    with torch.no_grad():
        first, second = (
            out if isinstance(out, torch.Tensor) else out[0][0] if isinstance(out[0], tuple | list) else out[0]
            for out in (small[name](**feeds), small[name](**swapped(feeds)))
        )
    assert torch.isfinite(first).all()
    torch.testing.assert_close(first, second.flip(0), rtol=1e-4, atol=1e-5)
    if entry.class_name != "ControlNetModel":  # its last layers start at zero
        assert not torch.allclose(first[0], first[1], atol=1e-4)


def test_clip_pools_at_the_largest_id_as_the_public_files_make_it(small):
    """`eos_token_id` 2 stands in the files; with any other value transformers would look for that token instead."""
    ids = torch.tensor([[5, 7, 999, 3], [999, 7, 5, 3]])
    for name in ("clip-l", "openclip-h", "openclip-bigg"):
        text = small[name] if hasattr(small[name], "text_projection") else None
        with torch.no_grad():
            out = small[name](input_ids=ids)
        ends = out.last_hidden_state[[0, 1], [2, 0]]
        if text is not None:
            torch.testing.assert_close(out.text_embeds, text.text_projection(ends))
        else:
            torch.testing.assert_close(out.pooler_output, ends)


# --- pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_parts_of_a_pipeline_fit(pipeline, tiny):
    parts = {folder: ARCHITECTURES[key].values(tiny) for folder, key in PIPELINES[pipeline].items()}
    net, vae = parts.get("unet") or parts["transformer"], parts["vae"]
    clips = [c for folder, c in parts.items() if folder.startswith("text_encoder") and "hidden_size" in c]
    states = sum(c["hidden_size"] for c in clips)
    t5 = next((c["d_model"] for c in parts.values() if "d_model" in c), None)

    assert net["in_channels"] == vae["latent_channels"] * (4 if "flux" in pipeline else 1)
    if "cross_attention_dim" in net and "caption_channels" not in net:
        assert net["cross_attention_dim"] == states
    if net.get("addition_embed_type") == "text_time":
        sizes = 5 if "refiner" in pipeline else 6
        pooled = parts["text_encoder_2"]["projection_dim"]
        assert net["projection_class_embeddings_input_dim"] == pooled + sizes * net["addition_time_embed_dim"]
    if "joint_attention_dim" in net:
        assert net["joint_attention_dim"] == t5 >= states  # SD3 pads the states of its CLIPs to T5's
        pooled = [c["hidden_size"] if "flux" in pipeline else c["projection_dim"] for c in clips]
        assert net["pooled_projection_dim"] == sum(pooled)
    if "caption_channels" in net:
        assert net["caption_channels"] == t5


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize(("control", "unet"), [("controlnet-sd15", "sd15-unet"), ("controlnet-sdxl", "sdxl-base-unet")])
def test_a_controlnet_fits_its_unet(control, unet, tiny):
    mine, theirs = ARCHITECTURES[control].values(tiny), ARCHITECTURES[unet].values(tiny)
    shared = (mine.keys() & theirs.keys()) - {"conditioning_embedding_out_channels"}
    assert {"block_out_channels", "cross_attention_dim", "layers_per_block", "down_block_types"} <= shared
    assert {k: mine[k] for k in shared} == {k: theirs[k] for k in shared}


# --- StyleGAN2 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("demodulate", [False, True])
def test_scaled_activations_give_what_scaled_weights_give(demodulate):
    """Equations 1 and 3 of arXiv:1912.04958, on the weights and one sample at a time, in float64."""
    from optimize.compile.stylegan import ModulatedConv

    torch.manual_seed(0)
    conv = ModulatedConv(6, 5, w_dim=8, demodulate=demodulate).double()
    x, w = torch.randn(3, 6, 7, 9, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    expected = []
    for row, style in zip(x, conv.affine(w), strict=True):
        weight = conv.weight * conv.gain * style[None, :, None, None]
        if demodulate:
            weight = weight / torch.sqrt(weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8)
        expected.append(F.conv2d(row[None], weight, padding=1))
    torch.testing.assert_close(conv(x, w), torch.cat(expected), rtol=1e-12, atol=1e-12)


def test_demodulation_gives_unit_variance():
    """Section 2.2: with inputs of unit variance the outputs have it too, whatever the style."""
    from optimize.compile.stylegan import ModulatedConv

    torch.manual_seed(0)
    conv = ModulatedConv(64, 64, w_dim=8)
    out = conv(torch.randn(2, 64, 32, 32), 10 * torch.randn(2, 8))[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(out.std(dim=(2, 3)), torch.ones(2, 64), rtol=0.2, atol=0)


def test_noise_is_the_same_in_every_build_and_acts_by_its_strength():
    entry = ARCHITECTURES["stylegan2"]
    torch.manual_seed(0)
    one = module_of(entry, tiny=True)
    torch.manual_seed(1)
    with torch.device("meta"):
        other = module_of(entry, tiny=True)
    noises = {k: v for k, v in one.named_buffers()}
    assert len(noises) == 7 and len({v.flatten()[0].item() for v in noises.values()}) == 7  # no two layers share
    for name, value in other.named_buffers():
        torch.testing.assert_close(value, noises[name], rtol=0, atol=0)
    z = normal(2, entry.tiny["z_dim"])
    before = one(z)
    one.blocks[2].conv0.noise_strength.data.fill_(0.5)
    assert not torch.allclose(before, one(z), atol=1e-3)


def test_stylegan_exports_with_any_batch(small):
    model = small["stylegan2"]
    z = normal(3, ARCHITECTURES["stylegan2"].tiny["z_dim"])
    program = torch.export.export(model, (z,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for batch in (1, 5):
        z = normal(batch, z.shape[1])
        torch.testing.assert_close(program.module()(z), model(z))


def test_stylegan_refuses_a_resolution_that_its_blocks_do_not_reach():
    from optimize.compile.stylegan import StyleGAN2Generator
    from optimize.errors import InputError

    with pytest.raises(InputError, match="power of two"):
        StyleGAN2Generator(resolution=96)
