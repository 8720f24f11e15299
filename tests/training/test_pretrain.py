"""Pre-training: a short run on a tiny model writes a whole backbone, goes on where it stopped, and says what it saw."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.mini.model import CONTEXT_TOKENS, load_mini
from ebr_engine.errors import EbrError
from ebr_engine.kernels import backend
from ebr_engine.media import degradations
from ebr_engine.training import pretrain, pretrainee, procedural, scenes
from ebr_engine.training.pretrain import PretrainConfig, batch, measured_codec, rate_factor
from ebr_engine.training.pretrainee import CLEAN_WORD, VOCABULARY, Pretrainee
from ebr_engine.training.scenes import ScenePool
from tests.tiny import TINY

QUICK = PretrainConfig(minutes=50, batch=4, sizes=(64,), size_odds=(1.0,), learning_rate=5e-3, save_every=1000, compile=False)


@pytest.fixture(scope="module")
def pool():
    """Four small scenes, rendered in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda count: None)
        patch.setattr(scenes, "_start", scenes._render_into)
        patch.setattr(scenes, "_run", lambda processes: None)
        return ScenePool(4, 64)


@pytest.fixture
def quick(pool, monkeypatch):
    """Pre-training by a clock on which every iteration takes a minute; `firsts` are the pools' first scenes."""
    firsts, seconds = [], iter(range(0, 10**9, 60))

    def small_pool(capacity, size, first, **_):
        firsts.append(first)
        return pool

    monkeypatch.setattr(pretrain, "ScenePool", small_pool)
    monkeypatch.setattr(pretrain, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    return firsts


def run(out, resume=True, **settings):
    pretrain.pretrain(out, PretrainConfig(**{**QUICK.__dict__, **settings}), resume, sizes=TINY)
    return load_mini(out)


def records(out):
    return [json.loads(line) for line in out.with_suffix(".log.jsonl").read_text().splitlines()]


def same(a, b):
    """Whether two files hold the same tensors."""
    from safetensors.torch import load_file

    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_writes_a_backbone_that_has_learned(tmp_path, quick, monkeypatch):
    losses = []

    def mse_loss(value, target):
        losses.append(F.mse_loss(value, target))
        return losses[-1]

    monkeypatch.setattr(pretrain, "F", SimpleNamespace(mse_loss=mse_loss))
    out = tmp_path / "new" / "tiny.safetensors"
    mini = run(out, minutes=50)
    assert mini.trunk.config == TINY
    assert (mini.training["iterations"], mini.training["minutes"], mini.training["sizes"]) == (50, 50, [64])
    assert len(losses) == 50
    early, late = (sum(part).item() / 10 for part in (losses[:10], losses[-10:]))
    assert 0 < late < 0.95 * early  # measured 0.87
    (record,) = records(out)
    assert record["iteration"] == 50
    assert record["loss64"] == pytest.approx(sum(losses).item() / 50, abs=1e-4)
    parts = (mini.conditioner, mini.trunk, mini.text_encoder)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    step = mini.conditioner(torch.tensor([300.0]), mini.context)[0]
    assert mini.trunk(torch.randn(1, 192, 1, 4, 6), step).isfinite().all()
    assert sorted(file.name for file in out.parent.iterdir()) == ["tiny.ckpt", "tiny.log.jsonl", "tiny.safetensors"]


def test_the_context_is_the_text_encoders_of_the_empty_caption(tmp_path, quick, monkeypatch):
    saved = []
    monkeypatch.setattr(pretrain, "save_mini", lambda path, mini, save=pretrain.save_mini: (saved.append(mini), save(path, mini)))
    loaded = run(tmp_path / "tiny.safetensors", minutes=2)
    for mini, rounding in ((saved[-1], 0.0), (loaded, 2**-6)):  # the file's encoder is bf16, a few layers of it
        ids = mini.text_encoder.tokenize([()])
        assert ids.tolist() == [[1] + [0] * (CONTEXT_TOKENS - 1)]
        torch.testing.assert_close(mini.context, mini.text_encoder(ids)[0], rtol=rounding, atol=rounding)
        assert mini.context[0].abs().max() > 0.1
        assert not mini.context[1:].any()
    assert torch.equal(loaded.context, saved[-1].context)
    assert torch.equal(loaded.codec.scale, saved[-1].codec.scale)


def test_a_run_goes_on_where_it_stopped(tmp_path, quick):
    out = tmp_path / "tiny.safetensors"
    run(out, minutes=30)
    out.rename(tmp_path / "first.safetensors")
    # No time is left: the same weights and averages are written again.
    run(out, minutes=30)
    assert same(out, tmp_path / "first.safetensors")
    mini = run(out, minutes=50)
    assert not same(out, tmp_path / "first.safetensors")
    assert mini.training["iterations"] == 50
    assert [record["iteration"] for record in records(out)] == [50]
    assert quick == [0, 10_000_000, 20_000_000]  # no scene of an earlier run comes again
    fresh = run(out, resume=False, minutes=2)
    assert fresh.training["iterations"] == 2
    assert quick[-1] == 0


def test_minutes_are_those_of_the_clock_that_is_named(tmp_path, quick):
    seconds = iter(range(0, 10**9, 120))  # twice what the other clock says
    pretrain.pretrain(tmp_path / "tiny.safetensors", replace(QUICK, minutes=6), sizes=TINY, clock=lambda: next(seconds))
    assert load_mini(tmp_path / "tiny.safetensors").training["iterations"] == 3


def test_a_killed_run_has_its_last_checkpoint(tmp_path, quick, monkeypatch):
    out, seen = tmp_path / "tiny.safetensors", []

    def killed(*arguments, batch=pretrain.batch):
        seen.append(1)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return batch(*arguments)

    monkeypatch.setattr(pretrain, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(out, minutes=20, save_every=3)
    assert load_mini(out).training["iterations"] == 6
    assert run(out, minutes=8).training["iterations"] == 8


def test_a_seed_means_one_backbone(tmp_path, quick):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tmp_path / f"{name}.safetensors", minutes=2, seed=seed)
    assert same(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not same(tmp_path / "a.safetensors", tmp_path / "c.safetensors")


def test_it_can_begin_with_finished_weights_and_says_so(quick, tmp_path):
    first = run(tmp_path / "first.safetensors", minutes=3)
    frozen = PretrainConfig(**{**QUICK.__dict__, "minutes": 1, "learning_rate": 0.0, "ema": 0.0, "seed": 1})
    pretrain.pretrain(tmp_path / "second.safetensors", frozen, start=tmp_path / "first.safetensors")
    second = load_mini(tmp_path / "second.safetensors")
    assert second.training["before"] == first.training
    assert second.trunk.config == first.trunk.config
    for part in ("trunk", "conditioner", "text_encoder", "codec"):
        for name, tensor in getattr(first, part).state_dict().items():
            torch.testing.assert_close(getattr(second, part).state_dict()[name], tensor, rtol=0, atol=0)


def test_weights_of_another_vocabulary_are_no_beginning(quick, tmp_path, monkeypatch):
    run(tmp_path / "first.safetensors", minutes=1)
    monkeypatch.setattr(pretrainee, "VOCABULARY", [*VOCABULARY, "fog"])
    with pytest.raises(EbrError, match="other words"):
        pretrain.pretrain(tmp_path / "second.safetensors", QUICK, start=tmp_path / "first.safetensors")


def test_seeds_of_other_splits_are_refused():
    for split in ("validation", "test"):
        with pytest.raises(EbrError, match="seed"):
            PretrainConfig(seed=degradations.seeds(split).start)


def test_every_parameter_has_one_optimizer():
    model = Pretrainee(TINY)
    muon, adam = pretrain.make_optimizers(model, QUICK)
    held = [p for optimizer in (muon, adam) for group in optimizer.param_groups for p in group["params"]]
    assert Counter(map(id, held)) == Counter(map(id, model.parameters()))
    assert all(p.ndim == 2 for p in muon.param_groups[0]["params"])
    # QKV, out, cross q and out, up and down of every block.
    assert len(muon.param_groups[0]["params"]) == 6 * TINY.num_layers


def test_the_learning_rate_warms_up_stays_and_decays():
    config = PretrainConfig(warmup=0.02, decay=0.35)
    assert rate_factor(0.0, config) == pytest.approx(0.05)  # not zero: the first step counts too
    assert rate_factor(0.009, config) == pytest.approx(0.5)
    for progress in (0.02, 0.3, 0.65):
        assert rate_factor(progress, config) == pytest.approx(1)
    assert rate_factor(0.825, config) == pytest.approx(0.5)
    assert rate_factor(1.0, config) == 0
    assert rate_factor(1.1, config) == 0


class Words:
    """In the text encoder's place: captions stay words."""

    def tokenize(self, captions):
        return captions


def captions(pool, **settings):
    config = PretrainConfig(**{**QUICK.__dict__, "batch": 200, **settings})
    return batch(pool, LappedCodec(), Words(), config, 64, torch.Generator().manual_seed(1))


def test_a_caption_says_what_was_done_and_what_is_seen(pool):
    words = captions(pool, caption_dropout=0.0, degraded=0.5)[1]
    for caption in words:
        damage, (kind, palette, scale) = caption[:-3], caption[-3:]
        assert kind in procedural.KINDS
        assert palette in procedural.PALETTES
        assert scale in procedural.SCALES
        if damage != (CLEAN_WORD,):
            strength, task = damage
            assert strength in degradations.STRENGTH_WORDS
            assert task in degradations.TASKS
        assert set(caption) <= set(VOCABULARY)
    kinds = Counter(caption[-4] for caption in words)
    assert set(kinds) == {CLEAN_WORD, *degradations.TASKS}
    assert 70 < kinds[CLEAN_WORD] < 130  # 100 expected, seven is a standard deviation


def test_dropped_captions_are_empty(pool):
    assert set(captions(pool, caption_dropout=1.0)[1]) == {()}
    some = [caption == () for caption in captions(pool, caption_dropout=0.3)[1]]
    assert 30 < sum(some) < 90  # 60 expected


def test_the_caption_fits_the_picture(pool, monkeypatch):
    seen = []

    def degrade(clean, task, generator, *, depth, strength):
        seen.append((task, strength.tolist()))
        assert depth.shape[0] == clean.shape[0] == len(strength)
        return torch.zeros_like(clean)

    monkeypatch.setattr(degradations, "degrade", degrade)
    latents, words = captions(pool, caption_dropout=0.0)
    black = LappedCodec().encode(torch.zeros(1, 3, 1, 64, 64))
    for latent, caption in zip(latents, words):
        assert torch.equal(latent[None], black) == (caption[0] != CLEAN_WORD)
    expected = Counter((degradations.strength_word(s), task) for task, strengths in seen for s in strengths)
    assert Counter(caption[:2] for caption in words if caption[0] != CLEAN_WORD) == expected


def test_larger_crops_come_in_smaller_batches_of_as_many_tokens(pool):
    text = pretrain.MiniTextEncoder(VOCABULARY, 16)
    config = PretrainConfig(batch=8, sizes=(32, 64))
    for size, count in ((32, 8), (64, 2)):
        latents, ids = batch(pool, LappedCodec(), text, config, size, torch.Generator().manual_seed(0))
        assert latents.shape == (count, 192, 1, size // 8, size // 8)
        assert ids.shape == (count, CONTEXT_TOKENS)


def test_the_codec_is_measured(pool):
    codec = measured_codec(LappedCodec, pool.crops(512, 64, torch.Generator().manual_seed(0))[0])
    clean, _, _ = pool.crops(64, 64, torch.Generator().manual_seed(1))
    latent = codec.encode(clean.unsqueeze(2)).transpose(0, 1).flatten(1)
    # Only the averages of a block (luminance and two colours) have a mean to take away.
    assert codec.mean.nonzero().flatten().tolist() == [0, 64, 128]
    means = latent[[0, 64, 128]]
    assert (means.mean(1).abs() / means.std(1)).max() < 0.2  # of 64 crops
    assert codec.scale.min() > 0
    # The square root of the deviation: fine channels are lifted, and are still the weaker ones.
    std = latent.std(1)
    plain = LappedCodec().encode(clean.unsqueeze(2)).transpose(0, 1).flatten(1).std(1)
    assert 1 < std.max() / std.min() < 0.5 * plain.max() / plain.min()
    torch.testing.assert_close(codec.decode(codec.encode(clean.unsqueeze(2))), clean.unsqueeze(2), rtol=0, atol=1e-5)


def test_the_whole_vocabulary_is_known_to_the_encoder():
    text = pretrain.MiniTextEncoder(VOCABULARY, 16)
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    ids = text.tokenize([(word,) for word in VOCABULARY])
    assert len(set(ids[:, 0].tolist())) == len(VOCABULARY)
    assert ids[:, 0].min() == 2
    with pytest.raises(EbrError, match="fog"):
        text.tokenize([("fog",)])


def test_weights_learn_by_native_gradients_what_they_learn_by_formulas(monkeypatch):
    monkeypatch.setattr(backend, "TUNE", "off")
    torch.manual_seed(3)
    model = Pretrainee(replace(TINY, attention_head_dim=16))
    latent = torch.randn(2, TINY.in_channels, 1, 8, 12)
    ids = model.text_encoder.tokenize([(), ("rain",)])
    found = []
    for asked in ("torch", "auto"):
        monkeypatch.setattr(backend, "ASKED", asked)
        model.zero_grad()
        pretrain.step(model, latent, ids, torch.Generator().manual_seed(0), torch.float32)
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, exact in found[0].items():
        torch.testing.assert_close(found[1][name], exact, rtol=1e-3, atol=1e-6 + 1e-4 * float(exact.abs().max()), msg=name)


def test_learned_layers_are_the_same_parameters_and_only_there():
    model = Pretrainee(TINY)
    before = dict(model.named_parameters())
    pretrainee.use_learned_linear(model.trunk)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert isinstance(model.trunk.blocks[0].up, pretrainee.LearnedLinear)
    x = torch.randn(2, 5, TINY.width)
    up = model.trunk.blocks[0].up
    assert torch.equal(up(x), F.linear(x, up.weight, up.bias))  # where nothing is cast
