"""A step of pre-training over the pretended device: tensors of one device alone, and every weight learns."""

import pytest
import torch

from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.kernels import backend
from ebr_engine.training import pretrain
from ebr_engine.training.pretrain import PretrainConfig
from ebr_engine.training.pretrainee import Pretrainee
from tests.device_lane.pretended import CUDA
from tests.tiny import TINY


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_weight_learns_on_a_device(device, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    model, config = Pretrainee(TINY).to(CUDA), PretrainConfig(batch=2, compile=False)
    ids = model.text_encoder.tokenize([("clean", "leaves"), ()]).to(CUDA)
    latent = LappedCodec().to(CUDA).encode(torch.rand(2, 3, 1, 32, 32).to(CUDA))
    optimizers = pretrain.make_optimizers(model, config, precision)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with backend.in_place():
        for _ in range(2):  # the modulation's first gradient comes through weights that begin at zero
            loss = pretrain.step(model, latent, ids, torch.Generator().manual_seed(0), precision)
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    assert loss.is_cuda
    still = {name for name, parameter in model.named_parameters() if bool((parameter == before[name]).all())}
    assert not still


def test_kernels_that_learn_no_weights_are_left_out_while_a_model_is_trained():
    class OnADevice:
        is_cuda = True

    served = backend.registered(OnADevice())
    with backend.in_place():
        assert not backend.registered(OnADevice())
    assert backend.registered(OnADevice()) == served
