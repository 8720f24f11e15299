"""From `Restorer.restore` to an operation is a short way, and it is the one that docs/internals.md tells."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from ebr_engine.kernels import backend

PAGE = Path(__file__).parents[2] / "docs" / "internals.md"
MOST = 12  # calls between the two, the operation's own included
REFERENCES = {"prompt_attention": "prompt_attention_ref", "gated_residual_norm": "gated_residual_norm_ref"}
REFERENCES |= {"qk_norm_rope": "qk_norm_rope_ref"}


def own_calls():
    """The functions of this project that are running, the outermost first, as `engine.run: run`."""
    calls, frame = [], sys._getframe(1)
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith("ebr_engine."):
            calls.append(f"{module.removeprefix('ebr_engine.')}: {name}")
        frame = frame.f_back
    return calls[::-1]


@pytest.fixture
def calls_to(monkeypatch, restorer, prompt):
    """`calls_to(operation)`: what is running when its reference is reached first, from `Restorer.restore` on."""

    def measure(operation):
        module, name = import_module(f"ebr_engine.kernels.{operation}"), REFERENCES[operation]
        seen, reference = [], getattr(module, name)

        def watched(*args, **kwargs):
            seen.append(own_calls())
            return reference(*args, **kwargs)

        monkeypatch.setattr(backend, "ASKED", "torch")  # native code would serve in the references' place
        monkeypatch.setattr(module, name, watched)
        restorer.restore(torch.full((3, 16, 24), 0.5), prompt=prompt, steps=1)
        assert seen, f"{name} was not reached"
        return [*seen[0][seen[0].index("engine.restorer: restore") :], f"kernels.{operation}: {name}"]

    return measure


@pytest.mark.parametrize("operation", REFERENCES)
def test_few_calls_lie_between_the_engine_and_an_operation(calls_to, operation):
    calls = calls_to(operation)
    assert len(calls) - 1 <= MOST, calls


def test_the_way_is_the_one_that_is_told(calls_to):
    text = PAGE.read_text(encoding="utf-8").split("## From a call to a kernel")[1].split("\n## ")[0]
    told = re.findall(r"^\d+\. `([\w.]+)`: `(?:\w+\.)*(\w+)`", text, re.MULTILINE)
    assert [": ".join(each) for each in told] == calls_to("prompt_attention")
