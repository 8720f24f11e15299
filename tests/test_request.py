"""A request: one place for every option; what cannot be is refused in one line, what is equal is one object."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from ebr_engine.errors import EbrError
from ebr_engine.request import FIELDS, LOAD, PLAN, RestoreRequest, names_of, typed, weighted


def test_every_field_says_what_it_is():
    for one in fields(RestoreRequest):
        assert {"stage", "panel", "help", "flags"} <= one.metadata.keys(), one.name
        assert one.metadata["help"].endswith("."), one.name
        assert all(flag.startswith("-") for flag in one.metadata["flags"]), one.name
    flags = [flag for one in FIELDS.values() for flag in one.metadata["flags"]]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tsk": "haze"}, ["'tsk'", "'task'"]),
        ({"t0": 0.0}, ["t0", "above 0"]),
        ({"t0": float("nan")}, ["t0", "nan"]),
        ({"strength": 2.1}, ["strength", "from 0 to 2", "2.1"]),
        ({"seed": -1}, ["seed", "at least 0"]),
        ({"precision": "int4"}, ["precision", "'int4'", "fp16"]),
        ({"tile_blend": "soft"}, ["tile blend", "'soft'"]),
        ({"encoder": ("preset",)}, ["preset", "KEY=VALUE"]),
        ({"task": "haze", "prompt": "p.safetensors"}, ["not both"]),
        ({"prompt": [("p.safetensors", float("inf"))]}, ["finite", "inf"]),
    ],
)
def test_what_no_run_can_have_is_refused_in_one_line(given, words, one_line):
    with pytest.raises(EbrError) as error:
        RestoreRequest.of(**given)
    one_line(error, words)


def test_it_goes_through_json_and_back():
    request = RestoreRequest.of(
        task=None, prompt=[("a.safetensors", 0.5), "b.pt"], t0=0.3, steps=7, copy_audio=False, encoder=("a=b",), vae=Path("vae")
    )
    values = json.loads(json.dumps(request.to_json()))
    assert set(values) == {"prompt", "t0", "steps", "copy_audio", "encoder", "vae"}  # what differs from the defaults
    back = RestoreRequest.from_json(values)
    assert back.with_(prompt=[(Path(path), weight) for path, weight in request.prompt]) == back
    assert back.to_json() == values
    assert hash(back) == hash(RestoreRequest.from_json(values))


@pytest.mark.parametrize(("name", "value"), [("steps", "many"), ("steps", True), ("guess", "perhaps"), ("t0", [1]), ("task", 3)])
def test_json_of_another_type_is_refused(name, value):
    with pytest.raises(EbrError, match=name):
        RestoreRequest.from_json({name: value})


def test_a_text_becomes_what_a_field_holds():
    texts = {"steps": "7", "strength": "0.5", "guess": "true", "color_fix": "wavelet", "vae": "folder"}
    found = {name: typed(FIELDS[name], text) for name, text in texts.items()}
    assert found == {"steps": 7, "strength": 0.5, "guess": True, "color_fix": "wavelet", "vae": Path("folder")}


def test_prompts_come_in_every_form():
    assert weighted(None) == ()
    assert weighted("a.pt") == (("a.pt", 1.0),)
    assert weighted(("a.pt", 0.5)) == (("a.pt", 0.5),)
    assert weighted(["a.pt", ("b.pt", 2)]) == (("a.pt", 1.0), ("b.pt", 2.0))
    assert weighted((("a.pt", 1.0), ("b.pt", 2.0))) == (("a.pt", 1.0), ("b.pt", 2.0))


def test_the_digest_is_of_all_that_decides_what_is_written(tmp_path):
    prompt = tmp_path / "p.safetensors"
    prompt.write_bytes(b"one")
    base = RestoreRequest.of(task="haze")
    digest = base.digest([(prompt, 1.0)])
    assert base.with_(device="cpu", offload="codec", offline=True, strict=True).digest([(prompt, 1.0)]) == digest
    others = [
        {"seed": 1},
        {"steps": 3},
        {"task": "rain"},
        {"quality": 80},
        {"tile": 64},
        {"precision": "fp8"},
        {"compare": "side"},
    ]
    assert len({base.with_(**other).digest([(prompt, 1.0)]) for other in others} | {digest}) == len(others) + 1
    assert base.digest([(prompt, 0.5)]) != digest
    prompt.write_bytes(b"two")
    assert base.digest([(prompt, 1.0)]) != digest


def test_stages_share_all_fields_between_them():
    stages = ("load", "plan", "run", "clip", "file")
    assert sorted(name for stage in stages for name in names_of(stage)) == sorted(FIELDS)
    assert "backbone" in names_of(LOAD)
    assert "task" in names_of(PLAN)
