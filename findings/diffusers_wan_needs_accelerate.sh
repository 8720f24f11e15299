#!/bin/sh
# diffusers 0.42.1, without accelerate (which `pip install diffusers torch` leaves out). A Wan transformer that was just saved cannot be
# loaded: without accelerate `low_cpu_mem_usage` falls back to False, which a model that keeps modules in float32 then refuses. The
# ValueError says that the option "cannot be False", and is the same where it was set to True; that accelerate is missing is only in a
# warning, which calls it "strongly recommended". Models that keep nothing in float32 load, Wan's VAE among them, and so does the
# transformer by way of `from_config` and `load_state_dict`.
. "$(dirname "$0")/run_with"
run_with diffusers==0.42.1 torch==2.13.0 numpy==2.4.6 <<'PYTHON'
from importlib.util import find_spec

import diffusers
import safetensors.torch
import torch

diffusers.logging.set_verbosity_error()
print("diffusers", diffusers.__version__, "torch", torch.__version__, "accelerate", find_spec("accelerate"))
heads = {"num_attention_heads": 2, "attention_head_dim": 12}
sizes = {"in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16, "num_layers": 1}
transformer = diffusers.WanTransformer3DModel(**heads, **sizes)
transformer.save_pretrained("transformer")
diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1).save_pretrained("vae")
outcomes = []
for kind, folder in ((diffusers.AutoencoderKLWan, "vae"), (diffusers.WanTransformer3DModel, "transformer")):
    for options in ({}, {"low_cpu_mem_usage": True}, {"torch_dtype": torch.float32}):
        try:
            kind.from_pretrained(folder, **options)
            outcomes.append("loaded")
        except ValueError as error:
            outcomes.append(f"ValueError: {error}")
        print(f"{kind.__name__}.from_pretrained({folder!r}, **{options}): {outcomes[-1]}")
by_hand = diffusers.WanTransformer3DModel.from_config(diffusers.WanTransformer3DModel.load_config("transformer"))
by_hand.load_state_dict(safetensors.torch.load_file("transformer/diffusion_pytorch_model.safetensors"))
assert all(torch.equal(value, transformer.state_dict()[name]) for name, value in by_hand.state_dict().items())
print("from_config and load_state_dict: every tensor as it was saved")
if outcomes[:3] != ["loaded"] * 3 or any("`low_cpu_mem_usage` cannot be False" not in outcome for outcome in outcomes[3:]):
    raise SystemExit("changed: the transformer loads without accelerate, or fails otherwise")
PYTHON
