"""Steps of learning over the pretended device, and faults in them that the lane finds."""

import pytest
import torch

from ebr_engine.backbones.base import ModelSource
from ebr_engine.backbones.registry import load_backbone
from ebr_engine.training import learner as learning
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.learner import Learner
from tests.device_lane.pretended import CUDA, DeviceFault, Pretended

CASES = {
    "float32": ("mini", "fp32", {}),
    "bfloat16, averaged": ("mini", "bf16", {"ema": 0.9}),
    "on policy": ("mini", "bf16", {"on_policy": 3, "loss": "pixel"}),
    "blocks computed twice, in parts": ("mini", "fp32", {"checkpointing": True, "accumulate": 2}),
    "wan": ("wan", "bf16", {"frames": 5, "per_block": True}),
    "flux": ("flux", "bf16", {}),
    "flux in fp8": ("flux", "fp8", {}),
    "flux2": ("flux2", "bf16", {}),
    "flux2 in fp8": ("flux2", "fp8", {}),
}


@pytest.fixture
def start(wide, published, device):
    """`start(backbone, precision, **settings)`: a run of learning on the device, and its latents."""

    def begin(name="mini", precision="fp32", **settings):
        model = wide if name == "mini" else published(name)
        settings = {"tokens": 4, "batch": 2, "size": 32, "warmup": 1, "loss": "velocity", "data": "pairs"} | settings
        config = LearnConfig("haze", backbone=name, precision=precision, iterations=4, **settings)
        backbone = load_backbone(name, ModelSource(model), CUDA, precision)
        learner = Learner.start(config, backbone)
        pixels = torch.rand(config.batch // config.accumulate, 3, config.frames, 32, 32).to(CUDA)
        latents = backbone.codec.encode(pixels), backbone.codec.encode(pixels * 0.5)
        return learner, lambda *_: latents

    return begin


@pytest.mark.parametrize(("backbone", "precision", "settings"), CASES.values(), ids=CASES)
def test_a_step_moves_the_prompt_and_waits_for_its_report_alone(
    backbone, precision, settings, start, device, monkeypatch, tmp_path
):
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    learner, batch = start(backbone, precision, **settings)
    before = learner.prompt()
    device.reads.clear()
    progress = learner.step(batch)
    assert device.reads == ["item", "item"]  # loss and norm, when all is done
    assert progress.loss > 0
    assert all(isinstance(one, Pretended) for one in (*learner.parameters, *(learner.average or ())))
    after = learner.prompt()
    assert not torch.equal(after.residual, before.residual)
    assert not torch.equal(after.alpha, before.alpha)


def test_the_prompt_is_left_on_the_cpu(start):
    learner, batch = start()
    learner.residual = learner.residual.detach().cpu().requires_grad_()
    with pytest.raises(DeviceFault, match="on the device and on the host"):
        learner.step(batch)


def test_the_conditioner_is_left_on_the_cpu(start, monkeypatch):
    monkeypatch.setattr(learning, "prepared", lambda config, backbone: backbone)
    learner, batch = start()
    with pytest.raises(DeviceFault, match="on the device and on the host"):
        learner.step(batch)


def test_the_host_waits_within_a_step(start, device, monkeypatch):
    loss = Learner.loss

    def curious(*given):
        found = loss(*given)
        return found if found.isfinite() else found * 0

    monkeypatch.setattr(Learner, "loss", curious)
    learner, batch = start()
    device.reads.clear()
    learner.step(batch)
    assert device.reads == ["__bool__", "item", "item"]
