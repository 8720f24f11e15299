"""From what is asked for to a plan: tasks, prompts, weights, strength and t0; what cannot be is told in one line."""

import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.backbones.registry import BACKBONES, spec
from ebr_engine.errors import EbrError, PromptError
from ebr_engine.prompts.catalogue import ASSETS
from tests.tiny import make_prompt, picture

EPS = torch.finfo(torch.float32).eps


def test_t0_is_the_prompts_unless_it_is_given(restorer):
    image, mild, strong = picture(), make_prompt(t0=0.1), make_prompt(t0=0.5)
    assert not torch.equal(restorer.restore(image, prompt=mild), restorer.restore(image, prompt=strong))
    assert torch.equal(restorer.restore(image, prompt=mild, t0=0.5), restorer.restore(image, prompt=strong))


def test_the_empty_prompt_needs_a_t0_only(restorer, prompt, relative_rms):
    image = picture()
    empty = restorer.restore(image, t0=prompt.t0)
    silent = restorer.restore(image, prompt=(prompt, 0.0))
    assert relative_rms(silent, empty) < 16 * EPS
    assert relative_rms(restorer.restore(image, prompt=prompt), empty) > 0.01


def test_a_prompt_that_was_learned_for_fewer_steps_takes_fewer(restorer):
    two, three, released = (make_prompt(steps=steps) for steps in (2, 3, 20))
    assert [len(restorer.plan(prompt=prompt).table) for prompt in (two, three, released)] == [2, 3, 5]
    assert len(restorer.plan(prompt=[two, three], mix="residual").table) == 3
    assert len(restorer.plan(prompt=two, steps=4).table) == 4
    assert len(restorer.plan(prompt=two, schedule="released").table) == 20
    assert len(restorer.plan(t0=0.2).table) == 5


def test_strength_scales_every_prompt_of_a_request(restorer, prompt, relative_rms):
    image, other = picture(), make_prompt(1)
    assert relative_rms(restorer.restore(image, prompt=prompt, strength=0.0), restorer.restore(image, t0=prompt.t0)) < 16 * EPS
    assert torch.equal(restorer.restore(image, prompt=prompt, strength=1.0), restorer.restore(image, prompt=prompt))
    for mix in ("residual", "velocity"):
        scaled = restorer.restore(image, prompt=[(prompt, 0.5), other], strength=1.5, mix=mix)
        assert torch.equal(scaled, restorer.restore(image, prompt=[(prompt, 0.75), (other, 1.5)], mix=mix))


def test_several_tasks_are_several_prompts():
    restorer, image = Restorer("mini", device="cpu", precision="fp32"), picture()
    both = restorer.restore(image, "rain:0.5+haze", supersample=1)
    files = {task: ASSETS / "mini" / "prompts" / f"{task}.safetensors" for task in ("rain", "haze")}
    assert torch.equal(both, restorer.restore(image, prompt=[(files["rain"], 0.5), files["haze"]]))


def test_half_a_prompt_twice_is_the_prompt(restorer, prompt, relative_rms):
    image = picture()
    once = restorer.restore(image, prompt=[(prompt, 1.0)])
    twice = restorer.restore(image, prompt=[(prompt, 0.5), (prompt, 0.5)], mix="residual")
    # One more addition in each of two blocks and five steps, carried through the rest.
    assert relative_rms(twice, once) < 16 * EPS
    other = restorer.restore(image, prompt=[(prompt, 0.5), (make_prompt(1), 0.5)], mix="residual")
    assert relative_rms(other, once) > 0.001


def test_the_mean_velocity_of_a_prompt_with_itself_is_its_own(restorer, prompt):
    image = picture()
    once = restorer.restore(image, prompt=prompt, mix="velocity")
    assert torch.equal(restorer.restore(image, prompt=[prompt, prompt], mix="velocity"), once)
    assert torch.equal(restorer.restore(image, prompt=prompt), once)
    both = [prompt, make_prompt(1)]
    assert not torch.equal(
        restorer.restore(image, prompt=both, mix="velocity"), restorer.restore(image, prompt=both, mix="residual")
    )


def test_velocity_mixes_prompts_of_unequal_length(restorer, prompt):
    longer = make_prompt(1, tokens=6)
    assert restorer.restore(picture(), prompt=[prompt, longer], mix="velocity").isfinite().all()
    with pytest.raises(EbrError, match="same number of tokens"):
        restorer.restore(picture(), prompt=[prompt, longer], mix="residual")


def test_a_prompt_may_be_a_file_a_task_or_itself(restorer, prompt, tmp_path, monkeypatch):
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path))
    file = tmp_path / "mini" / "moire.safetensors"
    prompt.save(file)
    image = picture()
    expected = restorer.restore(image, prompt=prompt)
    for request in ({"task": "moire"}, {"prompt": file}, {"prompt": str(file)}, {"prompt": [(file, 1)]}):
        assert torch.equal(restorer.restore(image, **request), expected)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, ["haze", "lowlight", "prompt"]),
        ({"task": "haze", "prompt": make_prompt()}, ["task", "prompt", "not both"]),
        ({"task": "fog"}, ["'fog'", "haze"]),
        ({"prompt": make_prompt(), "schedule": "slow"}, ["'slow'", "fast", "released"]),
        ({"prompt": make_prompt(), "steps": 0}, ["steps", "0"]),
        ({"prompt": make_prompt(), "steps": -3}, ["steps", "-3"]),
        ({"prompt": make_prompt(), "steps": 1, "schedule": "released"}, ["1 steps"]),
        ({"prompt": make_prompt(), "order": 3}, ["order", "3"]),
        ({"prompt": make_prompt(), "t0": 0.0}, ["t0", "0.0"]),
        ({"prompt": make_prompt(), "t0": 1.0}, ["t0", "1.0"]),
        ({"prompt": make_prompt(), "t0": float("nan")}, ["t0", "nan"]),
        ({"prompt": make_prompt(), "mix": "mean"}, ["'mean'", "residual", "velocity"]),
        ({"prompt": make_prompt(), "strength": -0.1}, ["strength", "-0.1"]),
        ({"prompt": make_prompt(), "strength": 2.5}, ["strength", "2.5"]),
        ({"prompt": make_prompt(), "strength": float("nan")}, ["strength", "nan"]),
        ({"task": "haze+fog"}, ["'fog'", "haze"]),
        ({"prompt": (make_prompt(), float("nan"))}, ["weight", "nan"]),
        ({"prompt": "nowhere.safetensors"}, ["nowhere.safetensors"]),
    ],
)
def test_a_request_that_cannot_be_met_is_told_in_one_line(restorer, request_, words, one_line):
    with pytest.raises(EbrError) as error:
        restorer.restore(picture(), **request_)
    one_line(error, words)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_prompt(backbone="wan"), ["wan", "mini"]),
        (make_prompt(width=32), ["width 32", "width 24"]),
        (make_prompt(blocks=3), ["3 blocks", "2 blocks"]),
    ],
)
def test_a_prompt_for_another_backbone_is_refused(restorer, other, words, one_line):
    with pytest.raises(PromptError) as error:
        restorer.restore(picture(), prompt=other)
    one_line(error, words)


def test_prompts_in_turn_are_one_run_after_the_other(restorer):
    image, first, second = picture(), make_prompt(0, t0=0.1), make_prompt(1, t0=0.4)
    heard = []
    both = restorer.restore(image, prompt=[first, (second, 0.5)], mix="turn", steps=3, callback=lambda *told: heard.append(told))
    after = restorer.restore(restorer.restore(image, prompt=first, steps=3), prompt=second, strength=0.5, steps=3)
    assert torch.equal(both, after)
    assert [done for done, _ in heard] == list(range(1, 1 + len(heard)))
    assert {total for _, total in heard} == {len(heard)}
    assert not torch.equal(both, restorer.restore(image, prompt=[(second, 0.5), first], mix="turn", steps=3))
    assert torch.equal(restorer.restore(image, prompt=first, mix="turn"), restorer.restore(image, prompt=first))


def test_one_after_the_other_is_what_auto_does_for_the_small_ones_alone(restorer):
    image, both = picture(), [make_prompt(0), make_prompt(1)]
    assert torch.equal(restorer.restore(image, prompt=both), restorer.restore(image, prompt=both, mix="turn"))
    assert {name for name in BACKBONES if spec(name).mix == "turn"} == {"mini", "mini-audio"}


def test_a_file_holds_no_two_runs(restorer, tmp_path):
    plan = restorer.plan(prompt=[make_prompt(0), make_prompt(1)], mix="turn")
    with pytest.raises(EbrError, match="one run"):
        restorer.build(tmp_path / "both.ebr", plan)
    assert not list(tmp_path.iterdir())
