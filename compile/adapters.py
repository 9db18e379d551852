"""How each class of network is called: its role, its named inputs and outputs, its axes.

One `Adapter` per class name, in one table. A `specs` function reads only the config (a mapping); a `forward` function
gets the torch module and its tensors. Names follow diffusers, transformers and optimum, which users know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optimize.errors import InputError

from .spec import Axis, TensorSpec

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Io:
    """What a network takes and gives, from its config."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Adapter:
    """`suffix` and `role` name the component; `io` reads the config; `forward(module, *tensors)` gives a tuple."""

    role: str
    io: Callable[[Config], Io]
    forward: Callable[..., tuple[Any, ...]]
    suffix: str = ""


BATCH = Axis("batch", 1, 1, 8)
TIMESTEP = TensorSpec("timestep", ("batch",), "float32", "timestep")


def pixel_axes(step: int, opt: int, low: int | None = None) -> tuple[Axis, Axis]:
    """Height and width in pixels: multiples of `step`, from 64 or below (a model of small images) to twice `opt`."""
    opt = max(step, opt // step * step)
    least = low or min(step * max(1, 64 // step), opt)
    return (
        Axis("height", least, max(opt, least), 2 * max(opt, least), step),
        Axis("width", least, max(opt, least), 2 * max(opt, least), step),
    )


def latent_divisor(config: Config) -> int:
    """Pixels per latent: the pipeline's VAE says (`vae_scale_factor`, put there by the source), else latent-sized
    channel counts mean the usual 8 and image-sized ones mean a network that works on pixels."""
    if "vae_scale_factor" in config:
        return int(config["vae_scale_factor"])
    return 1 if config.get("in_channels", 4) in (1, 3, 6) else 8


def image_dims(divisor: int) -> tuple[str, str]:
    return ("height", "width") if divisor == 1 else (f"height/{divisor}", f"width/{divisor}")


def tokens_axis(opt: int = 77, high: int = 308) -> Axis:
    return Axis("tokens", 1, min(opt, high), high)


# --- denoisers -------------------------------------------------------------------------------------------------------


def unet_io(config: Config) -> Io:
    divisor = latent_divisor(config)
    step = divisor * 2 ** (len(config["block_out_channels"]) - 1)
    h, w = image_dims(divisor)
    cross = config["cross_attention_dim"]
    inputs = [
        TensorSpec("sample", ("batch", config["in_channels"], h, w)),
        TIMESTEP,
        TensorSpec("encoder_hidden_states", ("batch", "tokens", cross if isinstance(cross, int) else cross[0])),
    ]
    inputs += added_conditions(config)
    size = config.get("sample_size") or 64
    size = size if isinstance(size, int) else size[0]
    return Io(tuple(inputs), ("out_sample",), (BATCH, *pixel_axes(step, size * divisor, step), tokens_axis()))


def added_conditions(config: Config) -> list[TensorSpec]:
    """SDXL's pooled text and sizes ("text_time"): the refiner has five of the latter, the base model six."""
    if config.get("addition_embed_type") != "text_time":
        return []
    per_id = config["addition_time_embed_dim"]
    total = config["projection_class_embeddings_input_dim"]
    ids = 5 if total - 5 * per_id == config["cross_attention_dim"] else 6
    return [
        TensorSpec("text_embeds", ("batch", total - ids * per_id)),
        TensorSpec("time_ids", ("batch", ids), fill="size"),
    ]


def unet_forward(model: Any, sample: Any, timestep: Any, text: Any, *added: Any) -> tuple[Any, ...]:
    conditions = dict(zip(("text_embeds", "time_ids"), added, strict=False)) or None
    return (model(sample, timestep, text, added_cond_kwargs=conditions, return_dict=False)[0],)


def controlnet_io(config: Config) -> Io:
    base = unet_io({**config, "vae_scale_factor": latent_divisor(config)})
    image = TensorSpec("controlnet_cond", ("batch", config.get("conditioning_channels", 3), "height", "width"))
    inputs = (*base.inputs[:3], image, *base.inputs[3:])
    levels = len(config["block_out_channels"])
    count = 1 + levels * config.get("layers_per_block", 2) + levels - 1
    outputs = (*(f"down_block_res_sample.{i}" for i in range(count)), "mid_block_res_sample")
    return Io(inputs, outputs, base.axes)


def controlnet_forward(model: Any, sample: Any, timestep: Any, text: Any, image: Any, *added: Any) -> tuple[Any, ...]:
    conditions = dict(zip(("text_embeds", "time_ids"), added, strict=False)) or None
    down, mid = model(sample, timestep, text, image, added_cond_kwargs=conditions, return_dict=False)
    return (*down, mid)


def unet_unconditional_io(config: Config) -> Io:
    divisor = latent_divisor(config)
    step = divisor * 2 ** (len(config["block_out_channels"]) - 1)
    size = config.get("sample_size") or 32
    size = size if isinstance(size, int) else size[0]
    sample = TensorSpec("sample", ("batch", config.get("in_channels", 3), *image_dims(divisor)))
    return Io((sample, TIMESTEP), ("out_sample",), (BATCH, *pixel_axes(step, size * divisor, step)))


def unet_unconditional_forward(model: Any, sample: Any, timestep: Any) -> tuple[Any, ...]:
    return (model(sample, timestep, return_dict=False)[0],)


def sd3_io(config: Config) -> Io:
    h, w = image_dims(8)
    inputs = (
        TensorSpec("hidden_states", ("batch", config["in_channels"], h, w)),
        TensorSpec("encoder_hidden_states", ("batch", "tokens", config["joint_attention_dim"])),
        TensorSpec("pooled_projections", ("batch", config["pooled_projection_dim"])),
        TIMESTEP,
    )
    step = 8 * config["patch_size"]
    most = config.get("pos_embed_max_size") or config["sample_size"]
    axes = pixel_axes(step, min(config["sample_size"], 128) * 8 // step * step)
    high = most * step
    return Io(inputs, ("out_sample",), (BATCH, *(_capped(a, high) for a in axes), tokens_axis(333, 512)))


def _capped(axis: Axis, high: int) -> Axis:
    return Axis(axis.name, min(axis.min, high), min(axis.opt, high), min(axis.max, high), axis.step)


def sd3_forward(model: Any, hidden: Any, text: Any, pooled: Any, timestep: Any) -> tuple[Any, ...]:
    return (model(hidden, text, pooled, timestep, return_dict=False)[0],)


def flux_io(config: Config) -> Io:
    inputs = [
        TensorSpec("hidden_states", ("batch", "image_tokens", config["in_channels"])),
        TensorSpec("encoder_hidden_states", ("batch", "tokens", config["joint_attention_dim"])),
        TensorSpec("pooled_projections", ("batch", config["pooled_projection_dim"])),
        TensorSpec("timestep", ("batch",), "float32", "unit"),
        TensorSpec("img_ids", ("image_tokens", 3), "float32", "positions"),
        TensorSpec("txt_ids", ("tokens", 3), "float32", "zeros"),
    ]
    if config.get("guidance_embeds"):
        inputs.append(TensorSpec("guidance", ("batch",), "float32", "guidance"))
    axes = (BATCH, Axis("image_tokens", 16, 4096, 16384), tokens_axis(512, 512))
    return Io(tuple(inputs), ("out_sample",), axes)


def flux_forward(
    model: Any, hidden: Any, text: Any, pooled: Any, timestep: Any, img_ids: Any, txt_ids: Any, guidance: Any = None
) -> tuple[Any, ...]:
    return (model(hidden, text, pooled, timestep, img_ids, txt_ids, guidance, return_dict=False)[0],)


def pixart_io(config: Config) -> Io:
    step = 8 * config["patch_size"]
    inputs = (
        TensorSpec("hidden_states", ("batch", config["in_channels"], *image_dims(8))),
        TensorSpec("encoder_hidden_states", ("batch", "tokens", config["caption_channels"])),
        TIMESTEP,
        TensorSpec("encoder_attention_mask", ("batch", "tokens"), "int64", "mask"),
    )
    return Io(inputs, ("out_sample",), (BATCH, *pixel_axes(step, config["sample_size"] * 8), tokens_axis(300, 300)))


def pixart_forward(model: Any, hidden: Any, text: Any, timestep: Any, mask: Any) -> tuple[Any, ...]:
    import torch

    # the mask's sizes meet the others only inside an opaque bias: say here that they agree
    torch._check(mask.shape[0] == hidden.shape[0])
    torch._check(mask.shape[0] == text.shape[0])
    torch._check(mask.shape[1] == text.shape[1])
    sizes = {"resolution": None, "aspect_ratio": None}
    out = model(hidden, text, timestep, added_cond_kwargs=sizes, encoder_attention_mask=mask, return_dict=False)
    return (out[0],)


def dit_io(config: Config) -> Io:
    step = 8 * config["patch_size"]
    inputs = (
        TensorSpec("hidden_states", ("batch", config["in_channels"], *image_dims(8))),
        TIMESTEP,
        TensorSpec("class_labels", ("batch",), "int64", f"ids:{config.get('num_embeds_ada_norm', 1000)}"),
    )
    return Io(inputs, ("out_sample",), (BATCH, *pixel_axes(step, config["sample_size"] * 8)))


def dit_forward(model: Any, hidden: Any, timestep: Any, labels: Any) -> tuple[Any, ...]:
    """DiT's own forward takes the image for square (`int(tokens ** 0.5)`), which a graph cannot; this one does not."""
    import torch.nn.functional as F

    p = model.patch_size
    rows, columns = hidden.shape[-2] // p, hidden.shape[-1] // p
    x = model.pos_embed(hidden)
    for block in model.transformer_blocks:
        x = block(x, timestep=timestep, class_labels=labels)
    norm = model.transformer_blocks[0].norm1
    shift, scale = model.proj_out_1(F.silu(norm.emb(timestep, labels, hidden_dtype=x.dtype))).chunk(2, dim=1)
    x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
    x = x.reshape(-1, rows, columns, p, p, model.out_channels).permute(0, 5, 1, 3, 2, 4)
    return (x.reshape(-1, model.out_channels, rows * p, columns * p),)


# --- VAE -------------------------------------------------------------------------------------------------------------


def vae_factor(config: Config) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


def vae_axes(config: Config) -> tuple[Axis, ...]:
    size = config.get("sample_size") or 512
    return (Axis("batch", 1, 1, 4), *pixel_axes(vae_factor(config), size if isinstance(size, int) else size[0]))


def vae_encoder_io(config: Config) -> Io:
    sample = TensorSpec("sample", ("batch", config["in_channels"], "height", "width"))
    return Io((sample,), ("latent_parameters",), vae_axes(config))


def vae_encoder_forward(model: Any, sample: Any) -> tuple[Any, ...]:
    """Mean and log-variance, `[batch, 2 * latent_channels, height/f, width/f]`, before any scaling factor."""
    moments = model.encoder(sample)
    return (model.quant_conv(moments) if getattr(model, "quant_conv", None) is not None else moments,)


def vae_decoder_io(config: Config) -> Io:
    latent = TensorSpec("latent", ("batch", config["latent_channels"], *image_dims(vae_factor(config))))
    return Io((latent,), ("sample",), vae_axes(config))


def vae_decoder_forward(model: Any, latent: Any) -> tuple[Any, ...]:
    z = model.post_quant_conv(latent) if getattr(model, "post_quant_conv", None) is not None else latent
    return (model.decoder(z),)


# --- text and vision -------------------------------------------------------------------------------------------------


def clip_io(config: Config) -> Io:
    high = config["max_position_embeddings"]
    ids = TensorSpec("input_ids", ("batch", "tokens"), "int64", f"clip:{config['vocab_size']}")
    return Io(
        (ids,),
        ("last_hidden_state", "pooler_output", "penultimate_hidden_state"),
        (BATCH, tokens_axis(min(77, high), high)),
    )


def clip_projected_io(config: Config) -> Io:
    base = clip_io(config)
    return Io(base.inputs, ("text_embeds", "last_hidden_state", "penultimate_hidden_state"), base.axes)


def clip_forward(model: Any, ids: Any) -> tuple[Any, ...]:
    out = model(input_ids=ids, output_hidden_states=True)
    return (out.last_hidden_state, out.pooler_output, out.hidden_states[-2])


def clip_projected_forward(model: Any, ids: Any) -> tuple[Any, ...]:
    out = model(input_ids=ids, output_hidden_states=True)
    return (out.text_embeds, out.last_hidden_state, out.hidden_states[-2])


def text_inputs(config: Config, *names: str) -> tuple[TensorSpec, ...]:
    fills = {"input_ids": f"ids:{config['vocab_size']}", "attention_mask": "mask"}
    fills["token_type_ids"] = f"types:{config.get('type_vocab_size') or 1}"
    return tuple(TensorSpec(n, ("batch", "tokens"), "int64", fills[n]) for n in names)


def t5_io(config: Config) -> Io:
    return Io(
        text_inputs(config, "input_ids", "attention_mask"), ("last_hidden_state",), (BATCH, tokens_axis(512, 512))
    )


def encoder_forward(model: Any, ids: Any, mask: Any) -> tuple[Any, ...]:
    return (model(input_ids=ids, attention_mask=mask)[0],)


def bert_io(config: Config) -> Io:
    high = config["max_position_embeddings"]
    names = ["input_ids", "attention_mask", "token_type_ids"]
    return Io(
        text_inputs(config, *names), ("last_hidden_state", "pooler_output"), (BATCH, tokens_axis(min(128, high), high))
    )


def bert_forward(model: Any, ids: Any, mask: Any, types: Any) -> tuple[Any, ...]:
    out = model(input_ids=ids, attention_mask=mask, token_type_ids=types)
    return (out[0], out[1])


def encoder_io(config: Config) -> Io:
    high = config.get("max_position_embeddings") or 512
    high -= 2 if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    first = "logits" if config.get("task_output") == "logits" else "last_hidden_state"
    return Io(text_inputs(config, "input_ids", "attention_mask"), (first,), (BATCH, tokens_axis(min(128, high), high)))


def vision_io(config: Config) -> Io:
    size, patch = config["image_size"], config["patch_size"]
    pixels = TensorSpec("pixel_values", ("batch", config.get("num_channels", 3), "height", "width"))
    outputs = ("logits",) if config.get("task_output") == "logits" else ("last_hidden_state",)
    return Io((pixels,), outputs, (BATCH, *pixel_axes(patch, size, 2 * patch)))


def vision_forward(model: Any, pixels: Any) -> tuple[Any, ...]:
    """The position embeddings are interpolated, so that every multiple of the patch size works."""
    return (model(pixel_values=pixels, interpolate_pos_encoding=True)[0],)


# --- language models with a KV cache ---------------------------------------------------------------------------------


def lm_io(config: Config) -> Io:
    """One graph for prefill (past 0) and decode (tokens 1): names as optimum's, one key and value pair per layer."""
    layers = config.get("num_hidden_layers") or config["n_layer"]
    heads = config.get("num_attention_heads") or config["n_head"]
    hidden = config.get("hidden_size") or config["n_embd"]
    size = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    high = config.get("max_position_embeddings") or config.get("n_positions") or 2048
    past = [
        TensorSpec(f"past_key_values.{i}.{kind}", ("batch", kv_heads, "past", size))
        for i in range(layers)
        for kind in ("key", "value")
    ]
    inputs = (
        TensorSpec("input_ids", ("batch", "tokens"), "int64", f"ids:{config['vocab_size']}"),
        TensorSpec("attention_mask", ("batch", "past+tokens"), "int64", "mask"),
        TensorSpec("position_ids", ("batch", "tokens"), "int64", "after:past"),
        *past,
    )
    outputs = ("logits", *(f"present.{i}.{kind}" for i in range(layers) for kind in ("key", "value")))
    half = high // 2
    axes = (BATCH, Axis("tokens", 1, min(512, half), half), Axis("past", 0, min(512, half), half))
    return Io(inputs, outputs, axes)


def lm_forward(model: Any, ids: Any, mask: Any, positions: Any, *past: Any) -> tuple[Any, ...]:
    from transformers import DynamicCache

    pairs = list(zip(past[0::2], past[1::2], strict=True))
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, past_key_values=DynamicCache(pairs)
    )
    layers = out.past_key_values.layers
    return (out.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


def stylegan_io(config: Config) -> Io:
    return Io((TensorSpec("z", ("batch", config["z_dim"])),), ("image",), (BATCH,))


def plain_forward(model: Any, *tensors: Any) -> tuple[Any, ...]:
    """Whatever holds the outputs: the tensors in it, in its order."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return tuple(leaf for leaf in tree_leaves(model(*tensors)) if isinstance(leaf, Tensor))


VAE = (
    Adapter("vae_encoder", vae_encoder_io, vae_encoder_forward, "_encoder"),
    Adapter("vae_decoder", vae_decoder_io, vae_decoder_forward, "_decoder"),
)
LM = (Adapter("lm", lm_io, lm_forward),)
CLIP_PROJECTED = (Adapter("text_encoder", clip_projected_io, clip_projected_forward),)
VISION = (Adapter("vision_encoder", vision_io, vision_forward),)

ADAPTERS: Mapping[str, tuple[Adapter, ...]] = {
    "UNet2DConditionModel": (Adapter("unet", unet_io, unet_forward),),
    "UNet2DModel": (Adapter("unet", unet_unconditional_io, unet_unconditional_forward),),
    "ControlNetModel": (Adapter("controlnet", controlnet_io, controlnet_forward),),
    "SD3Transformer2DModel": (Adapter("dit", sd3_io, sd3_forward),),
    "FluxTransformer2DModel": (Adapter("dit", flux_io, flux_forward),),
    "PixArtTransformer2DModel": (Adapter("dit", pixart_io, pixart_forward),),
    "DiTTransformer2DModel": (Adapter("dit", dit_io, dit_forward),),
    "AutoencoderKL": VAE,
    "CLIPTextModel": (Adapter("text_encoder", clip_io, clip_forward),),
    "CLIPTextModelWithProjection": CLIP_PROJECTED,
    "T5EncoderModel": (Adapter("text_encoder", t5_io, encoder_forward),),
    "BertModel": (Adapter("text_encoder", bert_io, bert_forward),),
    "ViTModel": VISION,
    "ViTForImageClassification": VISION,
    "GPT2LMHeadModel": LM,
    "LlamaForCausalLM": LM,
    "StyleGAN2Generator": (Adapter("generator", stylegan_io, plain_forward),),
}
"""Class name -> its adapters: one for most, encoder and decoder for a VAE."""

TASK_ADAPTERS: Mapping[str, tuple[Adapter, ...]] = {
    "feature-extraction": (Adapter("text_encoder", encoder_io, encoder_forward),),
    "fill-mask": (Adapter("text_encoder", encoder_io, encoder_forward),),
    "text-classification": (Adapter("text_encoder", encoder_io, encoder_forward),),
    "token-classification": (Adapter("text_encoder", encoder_io, encoder_forward),),
    "text-generation": LM,
    "image-classification": VISION,
}
"""For transformers classes with no row above: the adapter for the task that optimum's TasksManager finds."""


def adapters_for(class_name: str, task: str | None = None) -> tuple[Adapter, ...]:
    """The adapters of a class, or of its task. Raises InputError for a network that has neither."""
    found = ADAPTERS.get(class_name) or TASK_ADAPTERS.get(task or "")
    if not found:
        raise InputError(
            f"{class_name} has no adapter" + (f" and neither has its task {task}" if task else ""),
            expected="one of " + ", ".join(sorted(ADAPTERS)),
            mend="write a factory that returns a Component and export python:package.module:factory",
        )
    return found
