"""`mini-audio`'s codec and file: an orthonormal transform of sound, exactly undone, and a backbone of its own kind."""

import math

import pytest
import torch

from ebr_engine.backbones.base import ModelSource
from ebr_engine.backbones.mini_audio.codec import HOP, RATE, SoundCodec, border_filter, dct4_basis, frames_of, samples_of
from ebr_engine.backbones.mini_audio.model import WEIGHTS, load_mini_audio, save_mini_audio
from ebr_engine.backbones.registry import BACKBONES, load_backbone, medium_of, restores, spec
from ebr_engine.engine.restorer import Restorer
from ebr_engine.errors import EbrError
from ebr_engine.media import PICTURES, SOUND
from ebr_engine.media.sound.degradations import TASKS
from ebr_engine.prompts.catalogue import prompt_files
from ebr_engine.prompts.prompt import load_prompt
from tests.tiny import picture, save_tiny, save_tiny_audio


def sound(frames, batch=1, seed=0):
    return torch.randn(batch, frames * HOP, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_the_codec_is_orthonormal_and_undone_exactly(frames):
    codec = SoundCodec(scale=torch.linspace(0.1, 2, HOP))
    clip = frames_of(sound(frames, batch=2))
    assert clip.shape == (2, 128, frames, 2, 1)
    torch.testing.assert_close(codec.decode(codec.encode(clip)), clip, atol=2e-5, rtol=0)
    assert torch.equal(samples_of(clip), sound(frames, batch=2))
    energy = codec.analyse(sound(frames)).square().sum()
    torch.testing.assert_close(energy, sound(frames).square().sum(), rtol=1e-5, atol=0)


def test_its_bases_are_orthonormal():
    for matrix in (dct4_basis(HOP), border_filter(HOP)):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(HOP), atol=1e-5, rtol=0)


def test_a_latent_has_low_frequencies_in_its_first_row_and_every_one_in_its_place():
    codec, time = SoundCodec(), torch.arange(20 * HOP) / RATE
    for hertz in (500.0, 6000.0):
        latent = codec.encode(frames_of(torch.sin(2 * math.pi * hertz * time)[None]))[0, :, 10, :, 0]  # [128, 2]
        band, row = divmod(int(latent.square().T.flatten().argmax()), 128)
        assert band == (hertz > RATE / 4)
        assert abs((band * 128 + row + 0.5) * RATE / 2 / HOP - hertz) <= RATE / 2 / HOP
        around = latent.square().T.flatten()[band * 128 + row - 3 : band * 128 + row + 4].sum()
        assert around > 0.999 * latent.square().sum()  # a sine window leaks little


def test_a_statistic_of_a_frequency_meets_its_coefficient():
    codec = SoundCodec(scale=torch.arange(1.0, HOP + 1))
    plain = SoundCodec().encode(frames_of(sound(3)))
    torch.testing.assert_close(codec.encode(frames_of(sound(3))) * codec.spread(codec.scale), plain)
    assert codec.spread(codec.scale)[0, 5, 0, 1, 0] == 128 + 5 + 1
    assert not codec.tones.any()


@pytest.mark.parametrize("shape", [(1, 3, 4, 8, 8), (1, 128, 4, 1, 2), (1, 128, 0, 2, 1), (128, 4, 2, 1)])
def test_what_is_no_sound_is_refused(shape):
    with pytest.raises(EbrError, match="expected sound"):
        SoundCodec().encode(torch.zeros(shape))


def test_a_file_is_read_as_it_was_written_and_is_no_mini(tmp_path):
    path = save_tiny_audio(tmp_path / "tiny.safetensors")
    first = load_mini_audio(path)
    save_mini_audio(tmp_path / "again.safetensors", first)
    second = load_mini_audio(tmp_path / "again.safetensors")
    for part in ("conditioner", "trunk", "text_encoder", "codec"):
        for name, tensor in getattr(first, part).state_dict().items():
            assert torch.equal(getattr(second, part).state_dict()[name], tensor), name
    with pytest.raises(EbrError, match=r"is not a mini backbone"):
        Restorer("mini", model=path, device="cpu")
    with pytest.raises(EbrError, match=r"is not a mini-audio backbone"):
        Restorer("mini-audio", model=save_tiny(tmp_path / "mini.safetensors"), device="cpu")


def test_the_bundled_one_is_small_and_its_prompts_fit():
    folder = WEIGHTS.parent
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= 6_000_000
    backbone = load_backbone("mini-audio", ModelSource(), torch.device("cpu"), "fp32")
    assert backbone.multiple == 1
    prompts = prompt_files("mini-audio")
    assert set(prompts) == set(TASKS)
    for file in prompts.values():
        load_prompt(file).check("mini-audio", backbone.width, backbone.blocks)
    assert backbone.codec.scale.min() > 0


def test_media_are_told_apart():
    assert restores(SOUND) == ["mini-audio"]
    assert [medium_of(name) for name in BACKBONES] == [SOUND if spec(name).colours != 3 else PICTURES for name in BACKBONES]


def test_pictures_are_refused_with_a_word(tmp_path):
    restorer = Restorer("mini-audio", model=save_tiny_audio(tmp_path / "tiny.safetensors"), device="cpu")
    with pytest.raises(EbrError, match="mini-audio restores no pictures but sound"):
        restorer.restore(picture(), task="noise")
    with pytest.raises(EbrError, match="mini-audio restores no pictures but sound"):
        restorer.restore_batch([picture()], task="noise")
