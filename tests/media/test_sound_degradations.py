"""What is done to sound on purpose: as strong as it says, the same for a seed, and nothing where there is nothing."""

import pytest
import torch

from ebr_engine.media.sound.degradations import DIRECT, KEPT, NOISES, SNR, TASKS, degrade, mixed_at

SECOND = 16000


def voice(batch=1, length=SECOND):
    """Something with a pitch that comes and goes."""
    time = torch.arange(length) / SECOND
    wave = sum(torch.sin(2 * torch.pi * 120 * k * time) / k for k in range(1, 20)) * (
        0.2 + torch.sin(2 * torch.pi * 3 * time).abs()
    )
    return (0.1 * wave).expand(batch, -1).clone()


def made(task, strength, seed=0, **more):
    return degrade(voice(), task, torch.Generator().manual_seed(seed), torch.tensor([strength]), **more)[0]


def ratio(clean, error):
    return float(10 * torch.log10(clean.square().sum() / error.square().sum()))


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_noise_has_the_level_that_a_strength_says(kind, strength):
    noisy = made("noise", strength, kinds=[kind])
    assert noisy.isfinite().all()
    assert ratio(voice(), noisy - voice()) == pytest.approx(SNR[0] + (SNR[1] - SNR[0]) * strength, abs=0.01)


def test_clipping_cuts_at_a_share_of_the_peak():
    for strength, share in ((0.0, KEPT[0]), (1.0, KEPT[1])):
        assert made("clipping", strength).abs().max() <= share * voice().abs().max() * 1.0001
    mild, strong = (ratio(voice(), made("clipping", strength) - voice()) for strength in (0.0, 1.0))
    assert mild > strong + 6


def test_a_room_answers_later_than_the_sound_and_by_its_level():
    click = torch.zeros(1, SECOND)
    click[0, 100] = 1.0
    answer = degrade(click, "reverb", torch.Generator().manual_seed(3), torch.tensor([0.5]))[0][0]
    assert torch.equal(answer[:100], torch.zeros(100)) or answer[:100].abs().max() < 1e-6
    assert answer[100] == pytest.approx(1.0, abs=0.2)
    assert -10 * torch.log10(answer[101:].square().sum()) == pytest.approx(sum(DIRECT) / 2, abs=1)
    assert answer[100 + 200 : 1000].square().sum() > 10 * answer[-3000:].square().sum()


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_says_all(task):
    assert torch.equal(made(task, 0.5, seed=7), made(task, 0.5, seed=7))
    if task != "clipping":
        assert not torch.equal(made(task, 0.5, seed=7), made(task, 0.5, seed=8))


@pytest.mark.parametrize("task", TASKS)
def test_silence_does_no_harm(task):
    result, words = degrade(torch.zeros(2, 4000), task, torch.Generator().manual_seed(0))
    assert result.isfinite().all()
    assert result.abs().max() < 0.01
    assert len(words) == 2


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="unknown task 'haze'"):
        degrade(voice(), "haze", torch.Generator())


def test_mixing_takes_the_level_of_both():
    noise = torch.randn(SECOND, generator=torch.Generator().manual_seed(0)) * 40
    assert ratio(voice()[0], mixed_at(voice()[0], noise, 3.0) - voice()[0]) == pytest.approx(3.0, abs=0.01)
