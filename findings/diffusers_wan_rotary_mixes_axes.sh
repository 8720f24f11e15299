#!/bin/sh
# diffusers 0.35.0, against 0.42.1. The rotary tables of a Wan transformer are made with 2 * (head_dim // 6) columns for height and for
# width, and cut into parts of head_dim // 3. Where head_dim // 3 is odd (16, 40, 64) a cut falls inside a pair, which then takes its
# cosine from height and its sine from width and is no rotation; another pair takes the wrong axis. There is no error. The published
# models (128) and head_dim 12 are as in 0.42.1; with 16, the same weights and input give another velocity.
. "$(dirname "$0")/run_with"
finding() {
    run_with "diffusers==$1" torch==2.13.0 numpy==2.4.6 <<'PYTHON'
import os

import diffusers
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

old = diffusers.__version__ == "0.35.0"
print("diffusers", diffusers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
latent, text = torch.randn(1, 4, 1, 4, 120), torch.randn(1, 5, 8)
sizes = {"in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16, "num_layers": 1}
velocities = {}
for head in (12, 16, 128):
    cos, sin = WanRotaryPosEmbed(head, (1, 2, 2), 64)(latent)
    length = (cos[..., 0::2].square() + sin[..., 1::2].square()).sqrt()  # as the pairs are read from both
    print(f"head_dim {head}: a rotated pair keeps {length.min():.6f} to {length.max():.6f} of its length")
    model = diffusers.WanTransformer3DModel(num_attention_heads=2, attention_head_dim=head, **sizes).eval()
    weights = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=weights)
    with torch.no_grad():
        velocities[head] = model(latent, torch.tensor([500]), text).sample
    wrong = (length - 1).abs().max() > 0.1
    if wrong != (old and head == 16):
        raise SystemExit("changed: head_dim 16 is a rotation in both versions, or in none, or another one is not")
if old:
    torch.save(velocities, os.environ["VELOCITIES"])
    raise SystemExit
for head, before in torch.load(os.environ["VELOCITIES"]).items():
    distance = ((velocities[head] - before).norm() / velocities[head].norm()).item()
    print(f"head_dim {head}: velocity of the same weights differs from 0.35.0's by {distance:.1e} of its size")
    if distance > 1e-5 if head != 16 else distance < 1e-4:
        raise SystemExit("changed: not only the velocity of head_dim 16 differs")
PYTHON
}
VELOCITIES=$(mktemp)
export VELOCITIES
trap 'rm "$VELOCITIES"' EXIT
(finding 0.35.0)
(finding 0.42.1)
