"""A backbone under training: text encoder, conditioner and trunk as one module, and what it becomes when it is finished."""

import torch
from torch import Tensor, nn

from ebr_engine.backbones.layers import LearnedLinear
from ebr_engine.backbones.mini.codec import OrthonormalCodec
from ebr_engine.backbones.mini.model import CONTEXT_TOKENS, MINI, Mini, MiniTextEncoder
from ebr_engine.backbones.wan.model import WanConditioner, WanConfig, WanStep, WanTrunk
from ebr_engine.errors import EbrError
from ebr_engine.media import degradations
from ebr_engine.training import procedural
from ebr_engine.training.supply import CLEAN_WORD

VOCABULARY = [*procedural.CAPTION_WORDS, *degradations.CAPTION_WORDS, CLEAN_WORD]


class Pretrainee(nn.Module):
    """Text encoder, conditioner and trunk as one module under training."""

    def __init__(self, config: WanConfig = MINI, vocabulary: list[str] | None = None):
        super().__init__()
        self.text_encoder = MiniTextEncoder(vocabulary or VOCABULARY, config.text_dim)
        self.conditioner = WanConditioner(config)
        self.trunk = WanTrunk(config)
        self.initialise()

    def initialise(self) -> None:
        """Xavier weights, zero biases, and gates at a small value, so that a block starts near the identity."""
        for module in (self.conditioner, self.trunk):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.conditioner.kv_weight, std=self.conditioner.config.width**-0.5)
        nn.init.normal_(self.conditioner.time_in.weight, std=0.02)
        nn.init.zeros_(self.conditioner.time_proj.weight)
        with torch.no_grad():
            self.conditioner.scale_shift[:, 2::3] = 0.1
        nn.init.normal_(self.trunk.patch_out.weight, std=0.02)

    def begin_from(self, mini: Mini) -> None:
        """Take over a finished backbone's weights; `EbrError` when its captions have other words."""
        if mini.text_encoder.vocabulary != self.text_encoder.vocabulary:
            raise EbrError("these weights were trained with captions of other words; start from nothing")
        for part in ("text_encoder", "conditioner", "trunk"):
            getattr(self, part).load_state_dict(getattr(mini, part).state_dict())

    def forward(self, latent: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """Velocity of noisy latents [B, C, 1, h, w] at timesteps [B] with captions as token ids [B, 16]."""
        modulation, head = self.conditioner.modulations(timestep)
        context = self.conditioner.encode_text(self.text_encoder(ids))
        key, value = self.conditioner.keys_values(context)
        no_prompt = key.new_zeros(key.shape[0], 0, key.shape[2], 1, key.shape[4])
        weight = modulation.new_zeros(key.shape[0], 0)
        log_count = modulation.new_zeros(CONTEXT_TOKENS)
        return self.trunk(latent, WanStep(modulation, head, key, value, log_count, no_prompt, no_prompt, weight))


def use_learned_linear(trunk: nn.Module) -> None:
    """Replace the linear layers of every block by `LearnedLinear` ones of the same parameters, in place."""
    for block in trunk.blocks:
        for name, layer in block.named_children():
            if type(layer) is nn.Linear:
                learned = LearnedLinear(layer.in_features, layer.out_features, device="meta")
                learned.weight, learned.bias = layer.weight, layer.bias
                setattr(block, name, learned)


def finished(model: Pretrainee, average: dict[str, Tensor], codec: OrthonormalCodec, training: dict) -> Mini:
    """A frozen backbone from the averaged weights."""
    copy = Pretrainee(model.trunk.config, model.text_encoder.vocabulary)
    copy.load_state_dict(average)
    copy.requires_grad_(False)
    context = copy.text_encoder(copy.text_encoder.tokenize([()]))[0]
    return Mini(copy.conditioner, copy.trunk, codec, copy.text_encoder, context, training)
