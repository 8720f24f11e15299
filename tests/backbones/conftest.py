"""diffusers' models with random weights, as references and as checkpoints."""

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
SHIFT, FACTOR = 0.1159, 0.3611  # FLUX's own, of latents


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


@pytest.fixture
def wan(make_wan):
    """A tiny diffusers module and our two halves."""
    module, *halves = make_wan()
    return module, halves


@pytest.fixture(scope="session")
def modules():
    """diffusers' module of each backbone, no parameter zero or one."""
    from tests.backbones.checkpoints import diffusers_modules

    return diffusers_modules()


@pytest.fixture(scope="session")
def sources(modules, tmp_path_factory):
    """The same weights of each backbone in every layout; the paths by name."""
    from tests.backbones.checkpoints import written

    return written(modules, tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def vae_folders(tmp_path_factory):
    """Tiny random VAEs of Wan and FLUX in the real layout, whose pixels have a natural spread: 1/255 means what it means."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    wan = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    flux = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4, 4, 8, 8],
        latent_channels=16,
        norm_num_groups=2,
        shift_factor=SHIFT,
        scaling_factor=FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        for name, vae, latent in (("wan", wan, torch.randn(1, 16, 2, 8, 8)), ("flux", flux, torch.randn(1, 16, 16, 16))):
            vae.decoder.conv_out.weight.mul_(0.4 / vae.decode(latent).sample.std())  # in [-1, 1]
            vae.save_pretrained(root / name)
    return root
