"""A conditioner whose prompt is alive: the text tokens are embedded once, modulations and the prompt's rows in each step."""

from dataclasses import replace

import torch
from torch import Tensor

from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.flux.conditioning import FluxStep


class LiveFlux:
    """Tables of FLUX.1 and FLUX.2, equal to the conditioner's own."""

    @torch.no_grad()
    def __init__(self, backbone: Backbone, tokens: int):
        self.backbone = backbone
        whole = backbone.conditioner(torch.zeros(1, device=backbone.text["context"].device), **backbone.text)
        self.text = whole.text

    def __call__(self, timestep: Tensor, residual: Tensor, weight: Tensor) -> FluxStep:
        """See `Backbone.live`."""
        backbone = self.backbone
        with torch.no_grad():
            no_text = backbone.text["context"][:0]
            tables = backbone.conditioner(timestep.to(no_text.device), **backbone.text | {"context": no_text})
        tables = replace(tables, text=self.text).with_prompts(backbone.trunk, [(residual, weight)])
        return tables.to(backbone.device, backbone.dtype).batch()
