"""What the engine has to know of Wan 2.2 T2V-A14B: two transformers of Wan 2.1's sizes, one for much noise and one for little.

The second one takes over below a time, the boundary. A bridge that starts below it never meets the first one, so the second
one alone is loaded. Text, VAE and every size are those of Wan 2.1 14B.
"""

from dataclasses import replace
from functools import partial

from ebr_engine.backbones.pretrained import load_pretrained
from ebr_engine.backbones.wan.spec import SPEC as WAN

BOUNDARY = 0.875

SPEC = replace(
    WAN,
    name="wan22",
    title="Wan 2.2",
    configs={"wan22-a14b": WAN.configs["wan-14b"]},
    load=partial(load_pretrained, "wan22"),
    checkpoints=replace(
        WAN.checkpoints,
        default="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        folders=("transformer_2", "low_noise_model"),
        passed_over="transformer|.*high[-_]?noise.*|.*[-_]high[-_].*",
        marks=("transformer_2",),
        boundary=BOUNDARY,
    ),
    related=("wan",),
    published_prompts="",
    licences={"wan22-a14b": "Apache-2.0"},
    ran="random weights on a CPU: tiny, and its widths in two blocks",
    note=f"the low-noise expert alone, half of the model: a bridge from a T0 below {BOUNDARY} never meets the other",
)
