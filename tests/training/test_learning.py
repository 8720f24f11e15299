"""Prompt learning: only the prompt moves, the loss falls, and an interrupted run goes on as if it never stopped."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from ebr_engine.backbones.mini import load_mini, save_mini
from ebr_engine.backbones.wan import WanConfig
from ebr_engine.bridge import PROCESSES
from ebr_engine.codecs import PixelCodec
from ebr_engine.errors import EbrError
from ebr_engine.prompts import load_prompt
from ebr_engine.training import learning, scenes
from ebr_engine.training.degradations import TASKS, degrade, seeds
from ebr_engine.training.learning import LearnConfig, Learner, learn, rate_factor
from ebr_engine.training.pretrain import Pretrainee, finished
from ebr_engine.training.scenes import ScenePool

TINY = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=48,
    out_channels=48,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)
QUICK = LearnConfig("haze", tokens=4, iterations=6, batch=2, size=32, warmup=1, scenes=4, precision="fp32")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A backbone of random numbers that listens to its prompt; its codec weighs the channels unequally."""
    torch.manual_seed(1)
    model = Pretrainee(TINY)
    with torch.no_grad():
        model.trunk.patch_out.weight.mul_(10)
    codec = PixelCodec(scale=torch.linspace(0.5, 2, PixelCodec.channels))
    path = tmp_path_factory.mktemp("mini") / "tiny.safetensors"
    save_mini(path, finished(model, dict(model.named_parameters()), codec, {}))
    return path


@pytest.fixture(scope="module")
def pool():
    """Four small scenes, rendered in this process; `numbers` are the scenes' seeds."""
    numbers = []

    def render(number, size, original=scenes.render):
        numbers.append(number)
        return original(number, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "render", render)
        patch.setattr(torch, "set_num_threads", lambda count: None)
        patch.setattr(scenes, "_start", scenes._render_into)
        patch.setattr(scenes, "_run", lambda processes: None)
        pool = ScenePool(4, 64)
    pool.numbers = numbers
    return pool


@pytest.fixture(autouse=True)
def small_pool(pool, monkeypatch):
    monkeypatch.setattr(learning, "ScenePool", lambda capacity: pool)


def start(weights, **settings):
    return Learner.start(replace(QUICK, **settings), load_mini(weights))


def fixed_loss(learner, pool):
    """The loss of the prompt as it stands on 16 crops that are the same on every call."""
    generator = torch.Generator().manual_seed(99)
    clean, depth, _ = pool.crops(16, 32, generator)
    degraded = degrade(clean, learner.config.task, generator, depth=depth)
    clean, degraded = (learner.mini.codec.encode(x.unsqueeze(2)) for x in (clean, degraded))
    t = torch.linspace(0.05, 1, 16) * learner.config.t0
    noise = torch.randn(clean.shape, generator=generator)
    state, target = PROCESSES[learner.config.bridge](clean, degraded, noise, t, learner.config.t0)
    with torch.no_grad():
        return learner.loss(state, target, t).item()


@pytest.mark.parametrize("bridge", PROCESSES)
@pytest.mark.parametrize("loss", ["x0", "pixel"])
def test_the_loss_falls_by_every_process(weights, pool, bridge, loss):
    learner = start(weights, task="lowlight", bridge=bridge, loss=loss, iterations=40, batch=8)
    before = fixed_loss(learner, pool)
    for _ in range(40):
        learner.step(pool)
    # Measured 0.84 to 0.95 of it: random numbers can learn no more than to be less wrong.
    assert fixed_loss(learner, pool) < 0.97 * before


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_finite_gradients(weights, pool, task):
    learner = start(weights, task=task, loss="velocity")
    learner.step(pool)
    assert learner.iteration == 1
    for parameter in (learner.residual, learner.alpha):
        assert parameter.isfinite().all()
        assert learner.optimizer.state[parameter]["exp_avg"].abs().min() > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_the_prompt_and_its_strength_change(weights, pool, precision):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    learner = Learner.start(replace(QUICK, precision=precision), load_mini(weights, dtype=dtype))
    mini, fresh = learner.mini, load_mini(weights, dtype=dtype)
    residual, alpha, context = learner.residual.detach().clone(), learner.alpha.detach().clone(), mini.context.clone()
    for _ in range(3):
        learner.step(pool)
    for part in ("trunk", "conditioner", "text_encoder", "codec"):
        ours, theirs = getattr(mini, part), getattr(fresh, part)
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
        for parameter in ours.parameters():
            assert not parameter.requires_grad
            assert parameter.grad is None
    assert torch.equal(mini.context, context)
    assert not mini.context.requires_grad
    assert (learner.residual != residual).all()
    assert (learner.alpha != alpha).all()
    assert sum(len(group["params"]) for group in learner.optimizer.param_groups) == 2


def states(learner, pool, times):
    generator = torch.Generator().manual_seed(4)
    clean, depth, _ = pool.crops(len(times), 32, generator)
    degraded = degrade(clean, "haze", generator, depth=depth)
    clean, degraded = (learner.mini.codec.encode(x.unsqueeze(2)) for x in (clean, degraded))
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.tensor(times)
    return clean, *PROCESSES["ebr"](clean, degraded, noise, t, learner.config.t0), t


@pytest.mark.parametrize("t", [0.25, 0.125, 2**-10])
def test_the_x0_loss_is_the_velocity_loss_times_t_squared(weights, pool, t):
    velocity, x0 = start(weights, loss="velocity"), start(weights, loss="x0")
    _, state, target, times = states(velocity, pool, [t])
    # t is a power of two, so that scaling by it rounds nothing.
    assert x0.loss(state, target, times).item() == t**2 * velocity.loss(state, target, times).item()


def test_a_batch_weighs_every_sample_by_its_own_time(weights, pool):
    velocity, x0 = start(weights, loss="velocity"), start(weights, loss="x0")
    _, state, target, times = states(velocity, pool, [0.25, 0.03125])
    alone = [velocity.loss(state[i : i + 1], target[i : i + 1], times[i : i + 1]).item() for i in range(2)]
    expected = sum(float(t) ** 2 * loss for t, loss in zip(times, alone)) / 2
    assert x0.loss(state, target, times).item() == pytest.approx(expected, rel=1e-5)


def test_the_x0_and_pixel_losses_are_errors_of_the_clean_estimate(weights, pool):
    x0, pixel = start(weights, loss="x0"), start(weights, loss="pixel")
    clean, state, target, times = states(x0, pool, [0.05, 0.3])
    mini = x0.mini
    with torch.no_grad():
        step = mini.conditioner(times * 1000, mini.context, [(x0.residual, x0.alpha)]).batch()
        estimate = state - times.view(-1, 1, 1, 1, 1) * mini.trunk(state, step)
    latents = (estimate - clean).square().mean().item()
    pixels = (mini.codec.decode(estimate) - mini.codec.decode(clean)).square().mean().item()
    assert x0.loss(state, target, times).item() == pytest.approx(latents, rel=1e-4)
    assert pixel.loss(state, target, times).item() == pytest.approx(pixels, rel=1e-4)
    assert abs(latents / pixels - 1) > 0.01  # so the two are told apart


class Interrupted(KeyboardInterrupt):
    """Ctrl-C."""


def interrupt(iteration, iterations, loss, at=3):
    if iteration == at:
        raise Interrupted


def test_a_resumed_run_is_the_same_run(weights, tmp_path):
    whole, halves = tmp_path / "whole.safetensors", tmp_path / "halves.safetensors"
    heard = []
    expected = learn(QUICK, whole, model=weights, callback=lambda *progress: heard.append(progress))
    assert [step[:2] for step in heard] == [(i, 6) for i in range(1, 7)]
    with pytest.raises(Interrupted):
        learn(QUICK, halves, model=weights, callback=interrupt)
    assert halves.with_suffix(".ckpt").exists()
    assert not halves.exists()
    resumed = []
    prompt = learn(QUICK, halves, model=weights, callback=lambda *progress: resumed.append(progress))
    assert resumed == heard[3:]  # the losses too, to the last bit
    assert torch.equal(prompt.residual, expected.residual)
    assert torch.equal(prompt.alpha, expected.alpha)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["halves.safetensors", "whole.safetensors"]


def test_a_crash_loses_what_came_after_the_last_checkpoint_only(weights, tmp_path):
    def crash(iteration, iterations, loss):
        if iteration == 5:
            raise ZeroDivisionError

    out, other = tmp_path / "prompt.safetensors", tmp_path / "other.safetensors"
    with pytest.raises(ZeroDivisionError):
        learn(QUICK, out, model=weights, save_every=2, callback=crash)
    iterations = []
    prompt = learn(QUICK, out, model=weights, callback=lambda i, n, loss: iterations.append(i))
    assert iterations == [5, 6]
    assert torch.equal(prompt.residual, learn(QUICK, other, model=weights).residual)


def test_the_file_holds_the_prompt_and_how_it_was_learned(weights, tmp_path):
    out = tmp_path / "new" / "folder" / "prompt.safetensors"
    config = replace(QUICK, task="rain", t0=0.3, iterations=1)
    prompt, saved = learn(config, out, model=weights), load_prompt(out)
    assert torch.equal(saved.residual, prompt.residual)
    assert torch.equal(saved.alpha, prompt.alpha)
    assert not saved.residual.requires_grad
    assert (saved.backbone, saved.task, saved.t0, saved.t_min) == ("mini", "rain", 0.3, config.t_min)
    assert saved.training.items() >= json.loads(json.dumps(asdict(config))).items()
    assert 0 < saved.training["final_loss"] < 10
    assert saved.training["seconds"] >= 0
    saved.check("mini", TINY.width, TINY.num_layers)


def test_a_checkpoint_of_another_run_is_refused_and_kept(weights, tmp_path):
    out = tmp_path / "prompt.safetensors"
    with pytest.raises(Interrupted):
        learn(QUICK, out, model=weights, callback=interrupt)
    for change, names in (({"task": "rain"}, "task"), ({"t0": 0.3, "batch": 4}, "t0, batch")):
        with pytest.raises(EbrError, match=rf"other settings \({names}\).*--no-resume"):
            learn(replace(QUICK, **change), out, model=weights)
    assert out.with_suffix(".ckpt").exists()
    iterations = []
    learn(replace(QUICK, iterations=8), out, model=weights, callback=lambda i, n, loss: iterations.append(i))
    assert iterations == [4, 5, 6, 7, 8]


def test_a_run_can_start_anew_beside_a_checkpoint(weights, tmp_path):
    out = tmp_path / "prompt.safetensors"
    out.with_suffix(".ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(EbrError, match=r"prompt\.ckpt.*--no-resume"):
        learn(QUICK, out, model=weights)
    iterations = []
    learn(QUICK, out, model=weights, resume=False, callback=lambda i, n, loss: iterations.append(i))
    assert iterations == [1, 2, 3, 4, 5, 6]
    assert not out.with_suffix(".ckpt").exists()


def test_a_loss_that_is_not_finite_ends_the_run(weights, tmp_path):
    out = tmp_path / "prompt.safetensors"
    with pytest.raises(EbrError, match="loss is nan at iteration 1"):
        learn(replace(QUICK, alpha=float("nan")), out, model=weights)
    assert not out.exists()


def test_a_seed_means_one_prompt(weights, pool):
    def learned(seed):
        learner = start(weights, seed=seed)
        learner.step(pool)
        return learner.residual.detach()

    assert torch.equal(learned(3), learned(3))
    assert not torch.equal(learned(3), learned(4))


def test_no_seed_of_the_test_split_is_used(weights, pool, tmp_path, monkeypatch):
    used = []
    original = torch.Generator.manual_seed

    class Recorded(torch.Generator):
        def manual_seed(self, seed):
            used.append(seed)
            return original(self, seed)

    monkeypatch.setattr(torch, "Generator", Recorded)
    learn(replace(QUICK, iterations=1, seed=11), tmp_path / "prompt.safetensors", model=weights)
    assert used == [11]
    assert sorted(pool.numbers) == [0, 1, 2, 3]
    assert all(number in seeds("train") for number in (*used, *pool.numbers))


@pytest.mark.parametrize("seed", [-1, seeds("train").stop, seeds("validation").start, seeds("test").start])
def test_seeds_of_other_splits_are_refused(seed):
    with pytest.raises(EbrError, match=f"seed.*{seed}"):
        LearnConfig("haze", seed=seed)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "fog"}, ["'fog'", *TASKS]),
        ({"bridge": "rope"}, ["'rope'", *PROCESSES]),
        ({"loss": "l1"}, ["'l1'", *learning.LOSSES]),
        ({"precision": "int4"}, ["'int4'", "bf16", "fp32"]),
        ({"t0": 0.0}, ["t0", "0.0"]),
        ({"t0": 1.0}, ["t0", "1.0"]),
        ({"t0": 0.1, "t_min": 0.2}, ["t_min", "0.2"]),
        ({"iterations": 0}, ["iterations", "0"]),
        ({"batch": -1}, ["batch", "-1"]),
        ({"tokens": 0}, ["tokens", "0"]),
        ({"scenes": 0}, ["scenes", "0"]),
        ({"size": 36}, ["multiple of 8", "36"]),
        ({"size": 512}, ["256", "512"]),
    ],
)
def test_wrong_settings_are_told_in_one_line(settings, words):
    with pytest.raises(EbrError) as error:
        LearnConfig(**{"task": "haze", **settings})
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_the_learning_rate_warms_up_and_falls_to_a_twentieth():
    config = replace(QUICK, iterations=1000, warmup=10)
    factors = [rate_factor(i, config) for i in range(1001)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[4] == pytest.approx(0.5, rel=1e-3)
    assert factors[9] == pytest.approx(1, rel=1e-3)
    assert factors[500] == pytest.approx(0.525)
    assert factors[1000] == pytest.approx(0.05)
    assert all(a > b for a, b in zip(factors[9:], factors[10:]))
