"""Backbones describe themselves: what a spec says holds, and nothing outside their folders knows one by its name."""

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import ebr_engine
from ebr_engine.backbones.base import ModelSource
from ebr_engine.backbones.registry import BACKBONES, load_backbone, named_config, named_configs, spec
from ebr_engine.engine.restorer import Restorer
from ebr_engine.errors import BackboneError

PACKAGE = Path(ebr_engine.__file__).parent


def names_compared(source):
    """Lines of Python in which a backbone's name is compared, or is a key or an index."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            parts = node.keys
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        else:
            continue
        parts += [one for part in parts if isinstance(part, (ast.Tuple, ast.List, ast.Set)) for one in part.elts]
        found += [node.lineno for part in parts if isinstance(part, ast.Constant) and part.value in BACKBONES]
    return found


@pytest.mark.parametrize(
    "line", ['x.name == "wan"', 'y = {"flux": 1}', 'table["mini"]', 'name in ("wan", "flux")', 'match x:\n  case "mini": 1']
)
def test_a_comparison_of_a_name_is_found(line):
    assert names_compared(line)
    assert not names_compared('load("wan")\nbackbone: str = "mini"')


def test_no_file_outside_the_backbones_compares_their_names():
    files = [path for path in PACKAGE.rglob("*.py") if "backbones" not in path.relative_to(PACKAGE).parts]
    assert len(files) > 50
    assert {str(path): lines for path in files if (lines := names_compared(path.read_text(encoding="utf-8")))} == {}


def test_no_file_outside_the_backbones_takes_the_class_of_a_family_for_a_fact():
    classes = tuple(f"{family}{part}" for family in ("Wan", "Flux") for part in ("Config", "Trunk", "Conditioning", "Step"))
    files = [path for path in PACKAGE.rglob("*.py") if "backbones" not in path.relative_to(PACKAGE).parts]
    calls = (
        node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    checks = [ast.unparse(node) for node in calls if getattr(node.func, "id", "") == "isinstance"]
    assert len(checks) > 10
    assert [check for check in checks if any(name in check for name in classes)] == []


def test_the_registry_imports_nothing_heavy():
    code = (
        "import sys, ebr_engine.backbones.registry, ebr_engine.prompts.catalogue; print([m for m in sys.modules if m == 'torch'])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", BACKBONES)
def test_a_spec_is_of_its_name_and_its_sizes_make_its_halves(name):
    one = spec(name)
    assert one.name == name
    assert one.tile % (one.codec_costs.spatial * next(iter(one.configs.values())).patch[-1]) == 0
    for config in one.configs.values():
        assert one.config.from_diffusers(config.to_diffusers()) == config
        assert one.parameters(config, torch.bfloat16)["trunk_bytes"] > 0
    assert (one.released_size is None) == (one.released_timesteps is None)
    assert one.licences.keys() <= one.configs.keys()
    assert all(spec(other).injection == one.injection for other in one.related)
    step = one.conditioning.step
    assert tuple(field.name for field in fields(one.conditioning)) == step._fields
    assert step._fields[: len(one.conditioning.by_step)] == one.conditioning.by_step
    assert set(one.conditioning.in_trunk_dtype) < set(step._fields)


@pytest.mark.parametrize(
    ("name", "words"), [("Wan", "did you mean wan"), ("fluxx", "did you mean flux"), ("x", "choose one of mini")]
)
def test_an_unknown_name_is_answered_with_those_there_are(name, words):
    with pytest.raises(BackboneError, match=words):
        spec(name)
    with pytest.raises(BackboneError, match="unknown configuration"):
        named_config(name)
    klein = {"flux2-klein-4b", "flux2-klein-9b", "flux2-dev"}
    assert named_configs().keys() >= {"mini", "mini-audio", "wan-1.3b", "wan-14b", "flux-dev", "flux-schnell", *klein}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vae": "nowhere"}, "vae"),
        ({"context": "nowhere"}, "context"),
        ({"revision": "main"}, "revision"),
        ({"sample_latents": True}, "sample latents"),
        ({"vae": "nowhere", "context": "nowhere"}, "context, vae"),
    ],
)
def test_what_mini_does_not_take_is_refused(given, words, one_line):
    with pytest.raises(BackboneError, match=f"mini backbone takes no {words}: .* leave it out") as error:
        Restorer("mini", device="cpu", **given)
    one_line(error, [])


def test_what_mini_takes_is_taken():
    one = load_backbone("mini", ModelSource(offline=True), torch.device("cpu"), "fp32")
    assert (one.name, one.blocks, one.patch, one.multiple) == ("mini", 6, 1, 8)
