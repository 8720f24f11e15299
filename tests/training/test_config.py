"""Settings: documented, read from TOML and texts, and refused in one line."""

import pytest

from ebr_engine.backbones.registry import BACKBONES, load_backbone, spec
from ebr_engine.bridge.process import PROCESSES
from ebr_engine.errors import EbrError
from ebr_engine.media.degradations import seeds
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.training import config as module
from ebr_engine.training import report
from ebr_engine.training.config import (
    SETTINGS,
    LearnConfig,
    described,
    read_assignments,
    read_toml,
    resolve,
    to_toml,
)


def test_every_setting_is_documented_and_of_a_group():
    for name, one in SETTINGS.items():
        assert one.metadata["group"], name
        assert one.metadata["help"].endswith("."), name


def test_the_choices_are_those_of_the_library():
    assert set(module.BRIDGES) == set(PROCESSES)
    assert seeds("train") == range(module.SEEDS)
    assert {loss for name in BACKBONES for loss in spec(name).learning.losses} == set(module.LOSSES)
    assert callable(load_backbone)
    by_backbone = {name for name, one in SETTINGS.items() if one.metadata.get("by_backbone")}
    assert by_backbone == {name for backbone in BACKBONES for name in spec(backbone).learning.defaults}


def test_a_configuration_comes_back_from_its_own_toml(tmp_path):
    config = resolve({"task": "fog", "data": 'a "quoted" föhn\\n', "backbone": "wan", "size": "480x832", "flip": "false"})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert resolve(read_toml(path)) == config
    for one in SETTINGS.values():
        assert f"# {one.metadata['help']}" in path.read_text(encoding="utf-8")


def test_tables_of_a_file_may_have_any_name_or_none(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text('task = "rain"\nsize = [32, 64]\n[whatever]\nbatch = 3\nt0 = 0.2\n')
    assert resolve(read_toml(path)) == LearnConfig("rain", size=(32, 64), batch=3, t0=0.2)


def test_texts_get_the_settings_type():
    texts = ["batch=3", "learning_rate = 1e-3", "per_block=True", "size=64x32", "task=snow", "iterations=1e2"]
    config = resolve(read_assignments(texts))
    assert (config.batch, config.learning_rate, config.per_block, config.size) == (3, 1e-3, True, (64, 32))
    assert (config.iterations, type(config.iterations)) == (100, int)


def test_backbones_have_their_own_defaults_that_can_be_changed():
    wan = resolve({"task": "rain", "backbone": "wan", "data": "x", "batch": 4})
    assert (wan.tokens, wan.crop, wan.frames, wan.loss, wan.batch) == (226, (480, 832), 33, "velocity", 4)
    assert resolve({"task": "rain"}) == LearnConfig("rain")


def test_all_settings_are_told():
    lines = " ".join(described(LearnConfig("rain", data="pairs")))
    for name in SETTINGS:
        assert f"{name} " in lines or getattr(LearnConfig("rain", data="pairs"), name) == ""


def refused(words, call):
    with pytest.raises(EbrError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learnin_rate": 1}, ["'learnin_rate'", "did you mean 'learning_rate'"]),
        ({"quux": 1}, ["'quux'"]),
        ({"batch": "many"}, ["batch", "'many'", "int"]),
        ({"batch": 2.5}, ["batch", "2.5"]),
        ({"batch": True}, ["batch", "True"]),
        ({"flip": "perhaps"}, ["flip", "'perhaps'", "bool"]),
        ({"flip": 3}, ["flip", "3"]),
        ({"task": 3}, ["task", "3", "text"]),
        ({"size": "1x2x3"}, ["size", "1x2x3"]),
        ({"size": "large"}, ["size", "large"]),
        ({"t0": "nan"}, ["t0", "nan"]),
        ({"t0": []}, ["t0", "[]"]),
        ({"iterations": "inf"}, ["iterations", "inf"]),
    ],
)
def test_wrong_names_and_types_are_told(settings, words):
    refused(words, lambda: resolve({"task": "haze"} | settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "fog"}, ["'fog'", *TASKS]),
        ({"task": "fog", "data": "x", "synthetic": True}, ["'fog'", *TASKS]),
        ({"task": "../fog", "data": "x"}, ["'../fog'", "letters"]),
        ({"bridge": "rope"}, ["'rope'", *PROCESSES]),
        ({"loss": "l1"}, ["'l1'", *module.LOSSES]),
        ({"precision": "int4"}, ["'int4'", "bf16", "fp32"]),
        ({"optimizer": "lion"}, ["'lion'", "adamw"]),
        ({"bad_data": "ignore"}, ["'ignore'", "refuse"]),
        ({"t0": 0.0}, ["t0", "0.0"]),
        ({"t0": 1.0}, ["t0", "1.0"]),
        ({"t0": 0.1, "t_min": 0.2}, ["t_min", "0.2"]),
        ({"iterations": 0}, ["iterations", "0"]),
        ({"batch": -1}, ["batch", "-1"]),
        ({"tokens": 0}, ["tokens", "0"]),
        ({"scenes": 0}, ["scenes", "0"]),
        ({"size": 36}, ["multiple of 8", "36"]),
        ({"size": (64, -8), "data": "x"}, ["multiple of 8", "-8"]),
        ({"size": 512}, ["256", "512"]),
        ({"ema": 1.0}, ["ema", "1.0"]),
        ({"clip": float("nan")}, ["clip", "nan"]),
        ({"learning_rate": float("inf")}, ["learning_rate", "inf"]),
        ({"batch": 6, "accumulate": 4}, ["accumulate", "6", "4"]),
        ({"frames": 5}, ["mini", "frames", "5"]),
        ({"backbone": "wan", "loss": "velocity"}, ["wan", "--data"]),
        ({"backbone": "flux", "data": "x"}, ["pixel", "flux"]),
        ({"synthetic": True}, ["synthetic", "data"]),
        ({"data": "x", "cache": "y"}, ["views"]),
        ({"data": "x", "validate_every": 5}, ["validation"]),
        ({"bridge": "naive", "on_policy": 3}, ["on_policy", "naive"]),
        ({"bridge": "ddbm", "unroll": 3}, ["unroll", "ddbm"]),
        ({"unroll": 2, "on_policy": 3}, ["unroll", "on_policy"]),
        ({"unroll": 2, "loss": "velocity"}, ["unroll", "velocity"]),
        ({"ssim_weight": 0.1}, ["ssim_weight", "unroll"]),
        ({"ssim_weight": 0.1, "unroll": 2, "loss": "x0"}, ["ssim_weight", "pixel"]),
        ({"ssim_weight": -0.1, "unroll": 2}, ["ssim_weight", "-0.1"]),
    ],
)
def test_wrong_settings_are_told_in_one_line(settings, words):
    refused(words, lambda: LearnConfig(**{"task": "haze", **settings}))


@pytest.mark.parametrize("seed", [-1, seeds("train").stop, seeds("validation").start, seeds("test").start])
def test_seeds_of_other_splits_are_refused(seed):
    refused(["seed", str(seed)], lambda: LearnConfig("haze", seed=seed))


@pytest.mark.parametrize("content", [b"task = ", b"\xff\xfe", None])
def test_a_file_that_is_no_toml_is_named(tmp_path, content):
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_bytes(content)
    refused(["bad.toml"], lambda: read_toml(path))


def test_an_assignment_needs_an_equals_sign():
    refused(["'batch'", "key=value"], lambda: read_assignments(["batch"]))


def test_no_setting_has_the_name_of_what_a_run_adds_to_its_prompt():
    assert not {*report.METRICS, "seconds", "final_loss", "pairs", "skipped", "variant"} & SETTINGS.keys()
