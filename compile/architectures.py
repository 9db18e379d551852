"""Public architectures by name, as plain data: what `arch:NAME` builds with random weights.

Reading this imports no heavy package. `config` holds the values of the published config file that shape the network or
that its callers read; what a row leaves out is the default of the class. `tiny` are the overrides of `arch:NAME@tiny`:
the same kinds of layer and the same code paths in under two million parameters, and the parts of a tiny pipeline fit
each other as the big ones do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Architecture:
    """One network: `getattr(library, class_name)` with `config`, or with `{**config, **tiny}`."""

    library: Literal["diffusers", "transformers", "optimize"]
    class_name: str
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    source: str

    def values(self, tiny: bool = False) -> dict[str, Any]:
        """The config's values, with the overrides where `tiny` is asked for."""
        return {**self.config, **self.tiny} if tiny else dict(self.config)


# --- text encoders ---------------------------------------------------------------------------------------------------

# 2 is what the published files say, though the tokenizer's end token is 49407. transformers keeps a path of its own
# for it (pool at the largest id), and a vocabulary of 1000 keeps that path working.
CLIP_TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    **CLIP_TOKENS,
}
CLIP_L_TINY = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 128,
    "projection_dim": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
OPENCLIP_H = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 512,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
OPENCLIP_BIGG = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
OPENCLIP_BIGG_TINY = {
    **CLIP_L_TINY,
    "hidden_size": 64,
    "intermediate_size": 256,
    "projection_dim": 64,
    "num_attention_heads": 8,
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# as wide as the two CLIPs of SD3 together need: their states are padded to T5's
T5_TINY = {"vocab_size": 1000, "d_model": 128, "d_kv": 16, "d_ff": 320, "num_layers": 3, "num_heads": 8}

TEXT_ENCODERS: Mapping[str, Architecture] = {
    "clip-l": Architecture(
        "transformers",
        "CLIPTextModel",
        CLIP_L,
        CLIP_L_TINY,
        "stable-diffusion-v1-5/stable-diffusion-v1-5 text_encoder/config.json",
    ),
    "clip-l-projection": Architecture(
        "transformers",
        "CLIPTextModelWithProjection",
        CLIP_L,
        CLIP_L_TINY,
        "stabilityai/stable-diffusion-3.5-medium text_encoder/config.json",
    ),
    "openclip-h": Architecture(
        "transformers",
        "CLIPTextModel",
        OPENCLIP_H,
        {**CLIP_L_TINY, "hidden_size": 48, "intermediate_size": 192, "projection_dim": 24, "num_attention_heads": 6},
        "stabilityai/stable-diffusion-2-1 text_encoder/config.json",
    ),
    "openclip-bigg": Architecture(
        "transformers",
        "CLIPTextModelWithProjection",
        OPENCLIP_BIGG,
        OPENCLIP_BIGG_TINY,
        "stabilityai/stable-diffusion-xl-base-1.0 text_encoder_2/config.json",
    ),
    "t5-xxl": Architecture("transformers", "T5EncoderModel", T5_XXL, T5_TINY, "google/t5-v1_1-xxl config.json"),
    "bert-base": Architecture(
        "transformers",
        "BertModel",
        {
            "vocab_size": 30522,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "gelu",
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
        },
        {
            "vocab_size": 1000,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 128,
        },
        "google-bert/bert-base-uncased config.json",
    ),
}

# --- vision and language ---------------------------------------------------------------------------------------------

OTHER_TRANSFORMERS: Mapping[str, Architecture] = {
    "vit-b16": Architecture(
        "transformers",
        "ViTModel",
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "gelu",
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
            "layer_norm_eps": 1e-12,
            "qkv_bias": True,
        },
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": 64,
        },
        "google/vit-base-patch16-224-in21k config.json",
    ),
    "gpt2": Architecture(
        "transformers",
        "GPT2LMHeadModel",
        {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
        {
            "vocab_size": 1000,
            "n_positions": 128,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "bos_token_id": 999,
            "eos_token_id": 999,
        },
        "openai-community/gpt2 config.json",
    ),
    "llama": Architecture(
        "transformers",
        "LlamaForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {
            "vocab_size": 1000,
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        },
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0 config.json",
    ),
}

# --- U-Nets and ControlNets ------------------------------------------------------------------------------------------

SD_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "in_channels": 4,
}
SD_UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
# `attention_head_dim` is the NUMBER of heads here: diffusers keeps the wrong name for the sake of the published files
SD15_HEADS = {"cross_attention_dim": 768, "attention_head_dim": 8}
TINY_LEVELS = {"block_out_channels": (16, 32, 48, 48), "norm_num_groups": 8}
SD15_TINY = {**TINY_LEVELS, "cross_attention_dim": 32, "attention_head_dim": 2}

SDXL_LEVELS = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "in_channels": 4,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,  # pooled 1280 and six sizes of 256
}
SDXL_LEVELS_TINY = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 48),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 6),
    "cross_attention_dim": 32 + 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64 + 6 * 8,
    "norm_num_groups": 8,
}
CONTROL_TINY = {"conditioning_embedding_out_channels": (8, 16, 24, 32)}
NO_SIZE = ("sample_size",)  # a ControlNet has no such value

UNETS: Mapping[str, Architecture] = {
    "sd15-unet": Architecture(
        "diffusers",
        "UNet2DConditionModel",
        {"sample_size": 64, "out_channels": 4, **SD_LEVELS, **SD_UP, **SD15_HEADS},
        {"sample_size": 16, **SD15_TINY},
        "stable-diffusion-v1-5/stable-diffusion-v1-5 unet/config.json",
    ),
    "sd21-unet": Architecture(
        "diffusers",
        "UNet2DConditionModel",
        {
            "sample_size": 96,
            "out_channels": 4,
            **SD_LEVELS,
            **SD_UP,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        {"sample_size": 16, **TINY_LEVELS, "cross_attention_dim": 48, "attention_head_dim": (2, 4, 6, 6)},
        "stabilityai/stable-diffusion-2-1 unet/config.json",
    ),
    "sdxl-base-unet": Architecture(
        "diffusers",
        "UNet2DConditionModel",
        {**SDXL_LEVELS, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "out_channels": 4},
        SDXL_LEVELS_TINY,
        "stabilityai/stable-diffusion-xl-base-1.0 unet/config.json",
    ),
    "sdxl-refiner-unet": Architecture(
        "diffusers",
        "UNet2DConditionModel",
        {
            **SDXL_LEVELS,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (384, 768, 1536, 1536),
            "transformer_layers_per_block": 4,
            "attention_head_dim": (6, 12, 24, 24),
            "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
        },  # pooled 1280 and five sizes of 256
        {
            **SDXL_LEVELS_TINY,
            **TINY_LEVELS,
            "transformer_layers_per_block": 2,
            "attention_head_dim": (2, 4, 6, 6),
            "cross_attention_dim": 64,
            "projection_class_embeddings_input_dim": 64 + 5 * 8,
        },
        "stabilityai/stable-diffusion-xl-refiner-1.0 unet/config.json",
    ),
    "controlnet-sd15": Architecture(
        "diffusers",
        "ControlNetModel",
        {**SD_LEVELS, **SD15_HEADS, "conditioning_embedding_out_channels": (16, 32, 96, 256)},
        {**SD15_TINY, **CONTROL_TINY},
        "lllyasviel/sd-controlnet-canny config.json",
    ),
    "controlnet-sdxl": Architecture(
        "diffusers",
        "ControlNetModel",
        {
            **{k: v for k, v in SDXL_LEVELS.items() if k not in NO_SIZE},
            "conditioning_embedding_out_channels": (16, 32, 96, 256),
        },
        {**{k: v for k, v in SDXL_LEVELS_TINY.items() if k not in NO_SIZE}, **CONTROL_TINY},
        "diffusers/controlnet-canny-sdxl-1.0 config.json",
    ),
    "ddpm-cifar10": Architecture(
        "diffusers",
        "UNet2DModel",
        {
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "freq_shift": 1,
            "flip_sin_to_cos": False,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 2,
            "downsample_padding": 0,
            "attention_head_dim": None,
            "norm_eps": 1e-6,
        },
        {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8},
        "google/ddpm-cifar10-32 config.json",
    ),
}

# --- diffusion transformers ------------------------------------------------------------------------------------------

FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
FLUX_TINY = {
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}

TRANSFORMERS: Mapping[str, Architecture] = {
    "sd35-medium-transformer": Architecture(
        "diffusers",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        {
            "sample_size": 16,
            "num_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 128,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 32 + 64,
            "pos_embed_max_size": 48,
            "dual_attention_layers": (0, 1),
        },
        "stabilityai/stable-diffusion-3.5-medium transformer/config.json",
    ),
    "flux-dev-transformer": Architecture(
        "diffusers",
        "FluxTransformer2DModel",
        {**FLUX, "guidance_embeds": True},
        FLUX_TINY,
        "black-forest-labs/FLUX.1-dev transformer/config.json",
    ),
    "flux-schnell-transformer": Architecture(
        "diffusers",
        "FluxTransformer2DModel",
        {**FLUX, "guidance_embeds": False},
        FLUX_TINY,
        "black-forest-labs/FLUX.1-schnell transformer/config.json",
    ),
    "pixart-sigma-transformer": Architecture(
        "diffusers",
        "PixArtTransformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "interpolation_scale": 2,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
        },
        {
            "sample_size": 16,
            "num_layers": 3,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "cross_attention_dim": 64,
            "caption_channels": 128,
        },
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS transformer/config.json",
    ),
    "dit-xl-2-256": Architecture(
        "diffusers",
        "DiTTransformer2DModel",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_zero",
        },
        {
            "sample_size": 16,
            "num_layers": 3,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_embeds_ada_norm": 100,
        },
        "facebook/DiT-XL-2-256 transformer/config.json",
    ),
}

# --- VAEs ------------------------------------------------------------------------------------------------------------

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
VAE_16 = {**VAE, "latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
VAE_TINY = {"sample_size": 128, "block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8}

VAES: Mapping[str, Architecture] = {
    "vae-sd15": Architecture(
        "diffusers",
        "AutoencoderKL",
        {**VAE, "latent_channels": 4, "sample_size": 512, "scaling_factor": 0.18215},
        VAE_TINY,
        "stable-diffusion-v1-5/stable-diffusion-v1-5 vae/config.json",
    ),
    "vae-sd21": Architecture(
        "diffusers",
        "AutoencoderKL",
        {**VAE, "latent_channels": 4, "sample_size": 768, "scaling_factor": 0.18215},
        VAE_TINY,
        "stabilityai/stable-diffusion-2-1 vae/config.json",
    ),
    "vae-sdxl": Architecture(
        "diffusers",
        "AutoencoderKL",
        {**VAE, "latent_channels": 4, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        VAE_TINY,
        "stabilityai/stable-diffusion-xl-base-1.0 vae/config.json",
    ),
    "vae-sd3": Architecture(
        "diffusers",
        "AutoencoderKL",
        {**VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        VAE_TINY,
        "stabilityai/stable-diffusion-3.5-medium vae/config.json",
    ),
    "vae-flux": Architecture(
        "diffusers",
        "AutoencoderKL",
        {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        VAE_TINY,
        "black-forest-labs/FLUX.1-dev vae/config.json",
    ),
}

GENERATORS: Mapping[str, Architecture] = {
    "stylegan2": Architecture(
        "optimize",
        "StyleGAN2Generator",
        {
            "z_dim": 512,
            "w_dim": 512,
            "num_layers": 8,
            "resolution": 256,
            "channel_base": 16384,
            "channel_max": 512,
            "img_channels": 3,
        },
        {"z_dim": 32, "w_dim": 32, "num_layers": 8, "resolution": 32, "channel_base": 512, "channel_max": 32},
        "NVlabs/stylegan2-ada-pytorch train.py, cfg=paper256 (FFHQ at 256x256)",
    ),
}

ARCHITECTURES: Mapping[str, Architecture] = {
    **UNETS,
    **TRANSFORMERS,
    **VAES,
    **TEXT_ENCODERS,
    **OTHER_TRANSFORMERS,
    **GENERATORS,
}
"""Name -> one network."""

PIPELINES: Mapping[str, Mapping[str, str]] = {
    "sd15": {"text_encoder": "clip-l", "unet": "sd15-unet", "vae": "vae-sd15"},
    "sd21": {"text_encoder": "openclip-h", "unet": "sd21-unet", "vae": "vae-sd21"},
    "sdxl-base": {
        "text_encoder": "clip-l",
        "text_encoder_2": "openclip-bigg",
        "unet": "sdxl-base-unet",
        "vae": "vae-sdxl",
    },
    "sdxl-refiner": {"text_encoder_2": "openclip-bigg", "unet": "sdxl-refiner-unet", "vae": "vae-sdxl"},
    "sd35-medium": {
        "text_encoder": "clip-l-projection",
        "text_encoder_2": "openclip-bigg",
        "text_encoder_3": "t5-xxl",
        "transformer": "sd35-medium-transformer",
        "vae": "vae-sd3",
    },
    "flux-dev": {
        "text_encoder": "clip-l",
        "text_encoder_2": "t5-xxl",
        "transformer": "flux-dev-transformer",
        "vae": "vae-flux",
    },
    "flux-schnell": {
        "text_encoder": "clip-l",
        "text_encoder_2": "t5-xxl",
        "transformer": "flux-schnell-transformer",
        "vae": "vae-flux",
    },
    "pixart-sigma": {"text_encoder": "t5-xxl", "transformer": "pixart-sigma-transformer", "vae": "vae-sdxl"},
}
"""Pipeline -> its component folders, each with the name of its network."""
