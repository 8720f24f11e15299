"""Tiny random models saved in the layout of the published ones: transformer, VAE, text encoders, tokenizers."""

import json
from pathlib import Path
from typing import Any

import torch

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
WAN22_VAE = {  # of TI2V-5B, but for its widths
    "base_dim": 4,
    "decoder_base_dim": 8,
    "z_dim": 48,
    "num_res_blocks": 1,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [i / 48 - 0.5 for i in range(48)],
    "latents_std": [0.5 + i / 48 for i in range(48)],
}
FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 4),
}
FLUX2 = {
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "timestep_guidance_channels": 16,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 4, 4, 4),
}
# As Qwen3's writes one message of a user and the beginning of an answer that is not thought about.
QWEN_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{%- endif %}"
)


def write_wan(folder: Path) -> Path:
    """A Wan text-to-video model; its folder."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    _shaken(diffusers.WanTransformer3DModel(**WAN)).save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    config = transformers.UMT5Config(vocab_size=23, d_model=20, d_kv=4, d_ff=12, num_layers=2, num_heads=3)
    _shaken(transformers.UMT5EncoderModel(config)).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


def write_tokenizer(folder: Path) -> None:
    """T5's, of no words but its marks, in the files that every supported transformers reads."""
    from tokenizers import Tokenizer, models, processors

    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(models.Unigram([(mark, 0.0) for mark in marks.values()], unk_id=2))
    ended = {"single": ["$A", "</s>"], "pair": ["$A", "</s>", "$B", "</s>"], "special_tokens": [("</s>", 1)]}
    words.post_processor = processors.TemplateProcessing(**ended)
    folder.mkdir(parents=True)
    words.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "model_max_length": 512, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def write_wan22(folder: Path) -> Path:
    """A Wan 2.2 text-to-video model with its two experts, as diffusers' pipeline saves itself; its folder."""
    import diffusers

    torch.manual_seed(0)
    experts = [_shaken(diffusers.WanTransformer3DModel(**WAN)) for _ in range(2)]
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1)
    return _save_pipeline(folder, vae, *experts, boundary_ratio=0.875)


def write_wan22_5b(folder: Path) -> Path:
    """A Wan 2.2 model with the VAE of 48 channels, as diffusers' pipeline saves itself; its folder."""
    import diffusers

    torch.manual_seed(0)
    transformer = _shaken(diffusers.WanTransformer3DModel(**WAN | {"in_channels": 48, "out_channels": 48}))
    return _save_pipeline(folder, diffusers.AutoencoderKLWan(**WAN22_VAE), transformer, expand_timesteps=True)


def _save_pipeline(folder: Path, vae: torch.nn.Module, *transformers_: torch.nn.Module, **settings: Any) -> Path:
    """Save Wan's pipeline with a tiny text encoder; its folder."""
    import diffusers
    import transformers

    config = transformers.UMT5Config(vocab_size=23, d_model=20, d_kv=4, d_ff=12, num_layers=2, num_heads=3)
    write_tokenizer(folder / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = _shaken(transformers.UMT5EncoderModel(config))
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    diffusers.WanPipeline(tokenizer, encoder, vae, scheduler, *transformers_, **settings).save_pretrained(folder)
    return folder


def write_flux(folder: Path) -> Path:
    """A FLUX.1-dev model; its folder."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    _shaken(diffusers.FluxTransformer2DModel(**FLUX)).save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderKL(
        latent_channels=16,
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    vae.save_pretrained(folder / "vae")
    sizes = {"vocab_size": 3, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPTextConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    transformers.CLIPTextModel(clip).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    config = transformers.T5Config(vocab_size=23, d_model=20, d_kv=4, d_ff=12, num_layers=1, num_heads=3)
    _shaken(transformers.T5EncoderModel(config)).save_pretrained(folder / "text_encoder_2")
    write_tokenizer(folder / "tokenizer_2")
    return folder


def write_flux2(folder: Path) -> Path:
    """A FLUX.2 [klein] model; its folder."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    _shaken(diffusers.Flux2Transformer2DModel(**FLUX2), 0.3).save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.2, 3)
    vae.save_pretrained(folder / "vae")
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.Qwen3Config(vocab_size=300, num_hidden_layers=28, **sizes)
    _shaken(transformers.Qwen3ForCausalLM(config)).save_pretrained(folder / "text_encoder")
    write_qwen_tokenizer(folder / "tokenizer")
    modules = {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": False,
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(modules))
    return folder


def write_qwen_tokenizer(folder: Path) -> None:
    """A tokenizer that knows bytes, the words of a chat's frame, and its special tokens."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    merges = []
    for word in ("user", "assistant", "\u010a\u010a"):  # a line feed is written so
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    vocabulary = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = transformers.Qwen2TokenizerFast(
        vocab={word: i for i, word in enumerate([*vocabulary, *specials])},
        merges=merges,
        additional_special_tokens=specials[1:],
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_released_prompt(path: Path, backend: str, rows: int, width: int, blocks: int, seed: int = 1) -> dict:
    """A prompt as the authors release them; its residual [rows, width] and alpha [blocks]."""
    torch.manual_seed(seed)
    residual, alpha = torch.randn(rows, width) * 0.5, torch.rand(blocks)
    torch.save({"backend": backend, "deep_prompt_bank": {"prompts": residual[None]}, "alphas": list(alpha)}, path)
    return {"residual": residual, "alpha": alpha}


def _shaken(module: torch.nn.Module, by: float = 0.1) -> torch.nn.Module:
    """Random everywhere: biases and modulations of a fresh module are zero, which would hide mistakes."""
    for parameter in module.parameters():
        parameter.data += by * torch.randn_like(parameter)
    return module.eval()
