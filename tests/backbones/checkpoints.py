"""Tiny random transformers of every backbone in every layout that is loaded."""

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import save_file

from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux2.model import Flux2Config
from ebr_engine.backbones.wan.model import WanConfig
from tests.backbones.original_layouts import flux2_original, flux_original, wan_original

CONFIGS = {
    "wan": WanConfig(num_attention_heads=1, in_channels=4, out_channels=4, text_dim=10, freq_dim=16, ffn_dim=40, num_layers=3),
    "flux": FluxConfig(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=1,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        guidance_embeds=True,
    ),
    "flux2": Flux2Config(
        in_channels=4, num_layers=2, num_single_layers=3, num_attention_heads=1, joint_attention_dim=10, guidance_embeds=True
    ),
}
MODELS = {"wan": WanTransformer3DModel, "flux": FluxTransformer2DModel, "flux2": Flux2Transformer2DModel}
PREFIX = "model.diffusion_model."


def diffusers_modules():
    """diffusers' module of each backbone, no parameter zero or one."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        module = MODELS[name](**config.to_diffusers()).requires_grad_(False)
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        made[name] = module
    return made


def written(modules, folder_for):
    """The same weights of each backbone in every layout; the paths by name."""
    made = {}
    for name, module in modules.items():
        folder = folder_for(name)
        module.save_pretrained(folder / "sharded" / "transformer", max_shard_size="300KB")
        for part in ("vae", "text_encoder", "tokenizer"):
            (folder / "sharded" / part).mkdir()
        module.save_pretrained(folder / "single" / "transformer")
        state, config = module.state_dict(), CONFIGS[name]
        if name == "wan":
            original = wan_original(state, config.num_layers)
        else:
            write = flux_original if name == "flux" else flux2_original
            original = write(state, config.num_layers, config.num_single_layers)
        save_file(original, folder / "original.safetensors")
        prefixed = {PREFIX + key: tensor for key, tensor in original.items()}
        save_file(prefixed | {"first_stage_model.conv.weight": torch.randn(2)}, folder / "prefixed.safetensors")
        shards = folder / "original"
        shards.mkdir()
        keys = sorted(original)
        names = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        for i, shard in enumerate(names):
            save_file({key: original[key] for key in keys[i::3]}, shards / shard)
        save_file({"encoder.conv.weight": torch.randn(2)}, shards / "ae.safetensors")
        made[name] = {
            "sharded folder": folder / "sharded",
            "sharded transformer folder": folder / "sharded" / "transformer",
            "single folder": folder / "single",
            "single file": folder / "single" / "transformer" / "diffusion_pytorch_model.safetensors",
            "original file": folder / "original.safetensors",
            "original file among others": folder / "prefixed.safetensors",
            "original shards": shards,
            "a shard": shards / names[1],
        }
    return made


def clone(source, target):
    """A copy of a folder of files and folders."""
    target.mkdir(parents=True)
    for item in source.iterdir():
        if item.is_dir():
            clone(item, target / item.name)
        else:
            (target / item.name).write_bytes(item.read_bytes())
    return target
