"""diffusers' Wan transformer with random weights, as the reference of both halves."""

import pytest
import torch

from ebr_engine.backbones.wan.model import WanConfig
from ebr_engine.backbones.wan.weights import load_wan

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}


def random_weight(name, shape):
    """Signals keep their size from layer to layer, and no parameter is zero, one or shared."""
    if name.endswith("bias"):
        return torch.randn(shape) * 0.2
    if "norm" in name:
        return 1 + torch.randn(shape) * 0.2
    if name.endswith("scale_shift_table"):
        return torch.randn(shape) * 0.5
    weight = torch.empty(shape)
    return weight.uniform_(-1, 1).mul_((3 / weight[0].numel()) ** 0.5)


@pytest.fixture(scope="session")
def make_wan():
    """`make_wan(**changes)`: diffusers' module of a tiny configuration with changes, and our conditioner and trunk."""
    from diffusers import WanTransformer3DModel  # takes seconds, which tests without it need not wait for

    def make(**changes):
        torch.manual_seed(0)
        config = TINY | changes
        with torch.device("meta"):
            module = WanTransformer3DModel(**config)
        state = {name: random_weight(name, tensor.shape) for name, tensor in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        module.rope = type(module.rope)(config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"])
        return module.eval().requires_grad_(False), *load_wan(WanConfig.from_diffusers(dict(module.config)), state)

    return make
