"""A conditioner whose prompt is alive: the frozen part is computed once, the prompt's rows and the times' tables in each step."""

import torch
from torch import Tensor

from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.wan.model import WanConditioning, WanStep, merge_equal_rows, resize_rows
from ebr_engine.kernels.context_kv import finish, product


class LiveWan:
    """Tables of Wan (and of what is built like it) for prompts of `tokens` rows, equal to the conditioner's own.

    A key is RMSNorm(W(c + P) + b) = RMSNorm(Wc + WP + b): the text's part Wc is kept in float32, and WP is multiplied in the
    trunk's dtype, where rounding is relative to the prompt and not to the text, which is much larger.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, tokens: int):
        self.backbone, self.conditioner = backbone, backbone.conditioner
        context, weight = backbone.text["context"], self.conditioner.kv_weight
        rows, count = merge_equal_rows(context)
        key, value = self.conditioner.keys_values(self.conditioner.encode_text(rows[None]))
        self.text = (
            key.to(backbone.device, backbone.dtype),
            value.to(backbone.device, backbone.dtype),
            count.log().to(backbone.device),
        )
        self.product = product(resize_rows(self.conditioner.encode_text(context), tokens)[None], weight)
        self.weight = weight.to(backbone.dtype)

    def __call__(self, timestep: Tensor, residual: Tensor, weight: Tensor) -> WanStep:
        """See `Backbone.live`."""
        conditioner, config, backbone = self.conditioner, self.conditioner.config, self.backbone
        with torch.no_grad():
            modulation, head = conditioner.modulations(timestep.to(self.weight.device))
        rows = product(residual.unsqueeze(-3).to(self.weight.dtype), self.weight)
        kv = (self.product + rows).to(torch.promote_types(backbone.dtype, torch.float32))
        prompt = finish(kv, conditioner.kv_bias, conditioner.k_norm, config.num_attention_heads, config.eps)
        tables = WanConditioning(modulation, head, *self.text, *prompt, weight.unsqueeze(1))
        return tables.to(backbone.device, backbone.dtype).batch()
