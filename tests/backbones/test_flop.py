"""Operations of a run are counted as torch counts them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ebr_engine.backbones.flux.model import FluxConditioner, FluxTrunk
from ebr_engine.backbones.flux2.model import Flux2Conditioner
from ebr_engine.backbones.registry import spec
from ebr_engine.backbones.wan.model import WanConditioner, WanConfig, WanTrunk
from ebr_engine.engine.restorer import Restorer
from tests.tiny import TINY_FLUX, TINY_FLUX2

TINY = WanConfig((1, 2, 2), 2, 12, 8, 8, text_dim=10, freq_dim=16, ffn_dim=40, num_layers=3)


def counted(trunk, latent, step):
    with FlopCounterMode(display=False) as counter:
        trunk(latent, step)  # with gradients, so that attention is explicit products, which torch counts
    return counter.get_total_flops()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("prompts", [0, 2])
def test_wan(batch, prompts):
    torch.manual_seed(0)
    conditioner, trunk = WanConditioner(TINY), WanTrunk(TINY)
    torch.nn.init.normal_(conditioner.kv_weight)
    residuals = [(torch.randn(5, TINY.width), torch.ones(TINY.blocks))] * prompts
    step = conditioner(torch.tensor([300.0]), torch.randn(3, TINY.text_dim), residuals)[0]
    latent = torch.randn(batch, 8, 3, 6, 10)
    assert spec("wan").flop(TINY, latent.shape, step) == counted(trunk, latent, step)


@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("prompts", [0, 2])
def test_flux(batch, frames, prompts):
    torch.manual_seed(0)
    conditioner, trunk = FluxConditioner(TINY_FLUX), FluxTrunk(TINY_FLUX)
    residuals = [(torch.randn(5, TINY_FLUX.width), torch.ones(TINY_FLUX.blocks))] * prompts
    text = {"context": torch.randn(7, 10), "pooled": torch.randn(8)}
    step = conditioner.bake(trunk, torch.tensor([300.0]), text, residuals)[0]
    latent = torch.randn(batch, 16, frames, 6, 10)
    total = spec("flux").flop(TINY_FLUX, latent.shape, step)
    # The last block's rows of text are computed and not read, and so they are counted; the head reads the image alone.
    assert total == counted(trunk, latent, step)
    assert trunk(latent, step).shape == latent.shape


@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (2, 2)])
def test_flux2(batch, frames):
    conditioner, trunk = Flux2Conditioner(TINY_FLUX2), FluxTrunk(TINY_FLUX2)
    step = conditioner.bake(trunk, torch.tensor([300.0]), {"context": torch.randn(7, 10)})[0]
    latent = torch.randn(batch, 16, frames, 3, 5)
    assert spec("flux2").flop(TINY_FLUX2, latent.shape, step) == counted(trunk, latent, step)


def test_mini_counts_as_wan_does():
    assert Restorer("mini", device="cpu").backbone.spec.flop is spec("wan").flop
