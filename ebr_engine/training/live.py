"""A conditioner whose prompt is alive: the frozen part is computed once, the prompt's rows and the times' tables in each step."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ebr_engine.backbones.loading import Backbone
from ebr_engine.backbones.wan.model import WanConditioning, merge_equal_rows, resize_rows
from ebr_engine.kernels.context_kv import finish, product


class LiveWan:
    """Tables of Wan and `mini` for prompts of `tokens` rows, equal to the conditioner's own.

    A key is RMSNorm(W(c + P) + b) = RMSNorm(Wc + WP + b): the text's part Wc is kept in float32, and WP is multiplied in the
    trunk's dtype, where rounding is relative to the prompt and not to the text, which is much larger.
    """

    @torch.no_grad()
    def __init__(self, parts: Backbone, tokens: int):
        self.parts, self.conditioner = parts, parts.conditioner
        context, weight = parts.text["context"], self.conditioner.kv_weight
        rows, count = merge_equal_rows(context)
        key, value = self.conditioner.keys_values(self.conditioner.encode_text(rows[None]))
        self.text = key.to(parts.device, parts.dtype), value.to(parts.device, parts.dtype), count.log().to(parts.device)
        self.product = product(resize_rows(self.conditioner.encode_text(context), tokens)[None], weight)
        self.weight = weight.to(parts.dtype)

    def __call__(self, timestep: Tensor, residual: Tensor, weight: Tensor) -> Any:
        """The trunk's step for timesteps [B] (0 to 1000) and a prompt (residual [L, D] or [blocks, L, D], weight [blocks])."""
        conditioner, config, parts = self.conditioner, self.conditioner.config, self.parts
        with torch.no_grad():
            modulation, head = conditioner.modulations(timestep.to(self.weight.device))
        rows = product(residual.unsqueeze(-3).to(self.weight.dtype), self.weight)
        kv = (self.product + rows).to(torch.promote_types(parts.dtype, torch.float32))
        prompt = finish(kv, conditioner.kv_bias, conditioner.k_norm, config.num_attention_heads, config.eps)
        tables = WanConditioning(modulation, head, (*self.text, *prompt, weight.unsqueeze(1)))
        return tables.to(parts.device, parts.dtype).batch()


class LiveFlux:
    """Tables of FLUX, equal to the conditioner's own; the text tokens are embedded once."""

    @torch.no_grad()
    def __init__(self, parts: Backbone):
        self.parts = parts
        whole = parts.conditioner(torch.zeros(1, device=parts.text["context"].device), **parts.text)
        self.text = whole.text

    def __call__(self, timestep: Tensor, residual: Tensor, weight: Tensor) -> Any:
        """See `LiveWan`."""
        parts = self.parts
        with torch.no_grad():
            no_text = parts.text["context"][:0]
            tables = parts.conditioner(timestep.to(no_text.device), no_text, parts.text["pooled"])
        tables = replace(tables, text=self.text).with_prompts(parts.trunk, [(residual, weight)])
        return tables.to(parts.device, parts.dtype).batch()


def live_conditioner(parts: Backbone, tokens: int) -> LiveWan | LiveFlux:
    """The live conditioner of a backbone whose conditioner and text are where they will compute."""
    return LiveFlux(parts) if parts.name == "flux" else LiveWan(parts, tokens)
