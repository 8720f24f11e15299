"""A cache holds what would be encoded, finds it by content, and does not believe a damaged file."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ebr_engine.backbones.base import ModelSource
from ebr_engine.backbones.registry import load_backbone
from ebr_engine.errors import EbrError
from ebr_engine.training import latents as making
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import pair_samples
from ebr_engine.training.latents import LatentCache, LatentSamples, fill_cache, fingerprint

CPU = torch.device("cpu")


@pytest.fixture
def backbone(weights):
    return load_backbone("mini", ModelSource(weights), CPU, "fp32")


@pytest.fixture
def config(pairs, tmp_path):
    return LearnConfig("fog", data=str(pairs(count=3)), size=32, views=2, cache=str(tmp_path / "cache"))


def latents(config, backbone):
    return LatentSamples(config, pair_samples(config, config.data), backbone)


def files(config):
    return sorted(Path(config.cache).rglob("*.safetensors"))


def test_cached_latents_are_those_that_would_be_encoded(config, backbone, monkeypatch):
    plain = replace(config, cache="")
    with latents(plain, backbone) as fresh:
        expected = [fresh.batch([i, i + 1]) for i in range(6)]
    done = []
    made = fill_cache(config, pair_samples(config, config.data), backbone, lambda *progress: done.append(progress))
    assert made == (6, 0)
    assert done[-1] == (6, 6)
    assert len(files(config)) == 6
    monkeypatch.setattr(backbone.codec, "encode", None)  # nothing is encoded again
    with latents(config, backbone) as cached:
        for i, batch in enumerate(expected):
            for found, latent in zip(cached.batch([i, i + 1]), batch):
                assert torch.equal(found, latent)


def test_an_interrupted_filling_goes_on(config, backbone):
    def interrupt(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_cache(config, pair_samples(config, config.data), backbone, interrupt)
    assert fill_cache(config, pair_samples(config, config.data), backbone) == (2, 4)


def test_learning_fills_the_cache_itself(config, backbone):
    with latents(config, backbone) as empty:
        first = empty.batch([0, 1, 2])
    assert len(files(config)) == 3
    with latents(config, backbone) as filled:
        assert all(torch.equal(*pair) for pair in zip(first, filled.batch([0, 1, 2])))


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-4] + b"\x00\x00\x80\x3f", lambda data: b""])
def test_a_damaged_file_is_made_again(config, backbone, damage, caplog):
    fill_cache(config, pair_samples(config, config.data), backbone)
    path = files(config)[2]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert fill_cache(config, pair_samples(config, config.data), backbone) == (1, 5)
    assert path.read_bytes() == whole
    assert str(path) in caplog.text


def test_the_key_is_the_content_the_codec_and_the_crop(config, backbone, pairs, tmp_path):
    fill_cache(config, pair_samples(config, config.data), backbone)
    moved = shutil.copytree(config.data, tmp_path / "moved")
    assert fill_cache(config, pair_samples(replace(config, data=str(moved)), str(moved)), backbone) == (0, 6)
    brighter = pairs("other", count=3, height=56)
    assert fill_cache(config, pair_samples(config, str(brighter)), backbone)[0] == 6
    assert fill_cache(replace(config, size=40), pair_samples(replace(config, size=40), config.data), backbone)[0] == 6
    backbone.codec.scale *= 2
    assert fill_cache(config, pair_samples(config, config.data), backbone)[0] == 6


def test_codecs_that_differ_have_other_fingerprints(backbone, weights):
    same = load_backbone("mini", ModelSource(weights), CPU, "fp32").codec
    assert fingerprint(same) == fingerprint(backbone.codec)
    same.mean += 1
    assert fingerprint(same) != fingerprint(backbone.codec)


def test_bad_pairs_are_refused_or_left_out(config, backbone):
    (Path(config.data) / "target" / "01.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(EbrError, match=r"01\.png"):
        fill_cache(config, pair_samples(config, config.data), backbone)
    skipping = replace(config, bad_data="skip")
    shutil.rmtree(config.cache)
    assert fill_cache(skipping, pair_samples(skipping, config.data), backbone) == (4, 0)


def test_latents_that_are_not_finite_are_bad(config, backbone):
    backbone.codec.scale[3] = 0
    with pytest.raises(EbrError, match="not finite"), latents(config, backbone) as broken:
        broken.batch([0])


def test_the_following_batch_is_made_ahead(config, backbone):
    with latents(replace(config, cache=""), backbone) as data:
        expected = [data.batch([i]) for i in range(3)]
        asked = []
        data.samples.pixels, original = None, data.latents
        data.latents = lambda number: (asked.append(number), original(number))[1]
        data.batch([0], [1])
        data._ahead[1,].result()
        assert asked == [0, 1]
        assert all(torch.equal(*pair) for pair in zip(data.batch([1]), expected[1]))
        assert asked == [0, 1]


def test_learning_sees_what_restoring_sees(config, backbone, monkeypatch):
    def sharper(frames):
        return (frames * 0.5 + 0.2).clamp(0, 1)

    monkeypatch.setattr(making, "deconvolved", sharper)
    wanted = replace(config, deconvolve=True)
    samples = pair_samples(wanted, wanted.data)
    degraded, clean = samples.pixels(0)
    with LatentSamples(replace(wanted, cache=""), samples, backbone) as made:
        found = made.latents(0)
    seen = sharper(degraded.transpose(0, 1)).transpose(0, 1)
    assert torch.equal(found[0], backbone.codec.encode(seen[None])[0])
    assert torch.equal(found[1], backbone.codec.encode(clean[None])[0])
    index, view = samples.choose(0)
    assert len({LatentCache(Path(), one, backbone.codec).key(samples.pairs[index], view) for one in (config, wanted)}) == 2
