"""Tiny random models in the published layouts learn from files, clips too; real prompts come out."""

from dataclasses import replace

import pytest
import torch

from ebr_engine.prompts.prompt import load_prompt
from ebr_engine.training import loop
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.learner import Learner
from tests.real_layout import write_flux, write_flux2, write_wan, write_wan22, write_wan22_5b

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SMALL = {"size": 32, "batch": 2, "iterations": 2, "tokens": 5, "precision": "fp32", "device": "cpu", "loss": "velocity"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models, and a cache for their empty texts."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBR_CACHE_DIR", str(folder / "cache"))
        writers = {"wan": write_wan, "flux": write_flux, "flux2": write_flux2, "wan22": write_wan22, "wan22-5b": write_wan22_5b}
        yield {name: write(folder / name) for name, write in writers.items()}


def config(models, backbone, data, **settings):
    return LearnConfig("fog", backbone=backbone, model=str(models[backbone]), data=str(data), **SMALL | settings)


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ("wan", {}),
        ("wan", {"frames": 5, "checkpointing": True}),
        ("flux", {"precision": "fp8"}),
        ("flux", {"per_block": True}),
        ("flux2", {"per_block": True}),
        ("flux2", {"checkpointing": True}),
        pytest.param("wan22", {}, marks=pytest.mark.slow),
        ("wan22-5b", {}),
    ],
)
def test_the_loss_of_a_fixed_batch_falls(models, pairs, tmp_path, backbone, settings):
    if settings.get("frames"):
        data = tmp_path / "clips"
        for i in range(6):
            pairs(f"one{i}", count=1, names=("input", "target"))
            for side in ("input", "target"):
                (data / side / "street").mkdir(parents=True, exist_ok=True)
                (tmp_path / f"one{i}" / side / "00.png").rename(data / side / "street" / f"{i}.png")
    else:
        data = pairs()
    one = config(models, backbone, data, iterations=8, learning_rate=0.05, alpha=1.0, **settings)
    learner = Learner.start(one, loop.backbone_of(one, "cpu"))
    with loop.samples_of(one) as samples, loop.LatentSamples(one, samples, learner.backbone) as latents:
        degraded, clean = latents.batch([0, 1])
    cells = 32 // learner.backbone.codec.spatial
    assert degraded.shape[2:] == ((5 - 1) // 4 + 1 if settings.get("frames") else 1, cells, cells)
    state = learner.states([0, 1], degraded, clean)
    learner.states = lambda *_: state
    losses = [learner.step(lambda *_: (degraded, clean)).loss for _ in range(8)]
    assert sum(losses[-3:]) / 3 < (0.99 if backbone == "wan" else 0.9995) * losses[0]  # random weights hardly listen


@pytest.mark.parametrize("backbone", ["wan", "flux"])
def test_a_run_gives_a_prompt_that_fits(models, pairs, tmp_path, backbone):
    one = config(models, backbone, pairs(), per_block=backbone == "wan", validation=str(pairs("held")), validate_every=2)
    loop.learn(one, tmp_path / "fog.safetensors")
    prompt = load_prompt(tmp_path / "fog.safetensors")
    assert (prompt.backbone, prompt.task, prompt.steps) == (backbone, "fog", 20)
    assert prompt.residual.shape[-2:] == (5, 24)
    loaded = loop.backbone_of(one, "cpu")
    prompt.check(backbone, loaded.width, loaded.blocks)
    assert 0 < prompt.training["psnr"] < 60

    from ebr_engine import Restorer

    restorer = Restorer(backbone, model=models[backbone], device="cpu", precision="fp32")
    assert restorer.restore(torch.rand(3, 32, 48), prompt=tmp_path / "fog.safetensors", steps=1).isfinite().all()


def test_a_resumed_run_of_a_cached_clip_model_is_the_same_run(models, pairs, tmp_path):
    one = config(models, "wan", pairs(), iterations=4, views=1, cache=str(tmp_path / "cache"), batch=1)

    def interrupt(iteration, *_):
        if iteration == 2:
            raise KeyboardInterrupt

    whole = loop.learn(replace(one, cache=""), tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        loop.learn(one, tmp_path / "halves.safetensors", callback=interrupt)
    assert torch.equal(loop.learn(one, tmp_path / "halves.safetensors").residual, whole.residual)
