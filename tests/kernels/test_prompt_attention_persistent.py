"""Cross-attention to the merged text and one prompt, a program several tiles, operands through descriptors."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels import prompt_attention as module
from ebr_engine.kernels.prompt_attention import prompt_attention, prompt_attention_ref
from ebr_engine.kernels.prompt_attention_persistent import described, prompt_attention_persistent_launch

INTERPRETED = pytest.mark.skipif(not backend.INTERPRETED, reason="needs Triton's interpreter or a device")
FORMS = pytest.mark.parametrize("form", ["persistent", "specialized"])
# B, heads, queries, head width, text rows, prompt rows; the interpreter's tiles are 32 × 32, for three programs.
SHAPES = [(1, 1, 1, 16, 1, 1), (2, 3, 37, 16, 2, 33), (1, 2, 70, 64, 3, 75)]


def inputs(batch, heads, queries, head, text, length):
    text_key, text_value = torch.randn(2, 1, heads, text, head).unbind()
    prompt_key, prompt_value = torch.randn(2, 1, heads, length, head).unbind()
    return {
        "q": torch.randn(batch, queries, heads, head).transpose(1, 2),
        "text_key": text_key,
        "text_value": text_value,
        "text_log_count": torch.randint(1, 226, (text,)).float().log(),
        "prompt_key": prompt_key,
        "prompt_value": prompt_value,
        "prompt_weight": torch.randn(1),
    }


@INTERPRETED
@FORMS
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula(form, shape, relative_rms):
    given = inputs(*shape)
    out = prompt_attention_persistent_launch(**given, form=form)
    assert out.transpose(1, 2).is_contiguous()
    expected = prompt_attention_ref(**{name: value.double() for name, value in given.items()})
    assert relative_rms(out, expected) < 16 * torch.finfo(torch.float32).eps


@INTERPRETED
def test_in_half_precision_it_is_as_near_as_plain_torch(relative_rms):
    given = inputs(*SHAPES[1])
    low = {name: value if "weight" in name or "count" in name else value.half() for name, value in given.items()}
    exact = prompt_attention_ref(**{name: value.double() for name, value in low.items()})
    out = prompt_attention_persistent_launch(**low, form="persistent")
    assert relative_rms(out, exact) <= 2 * relative_rms(prompt_attention_ref(**low), exact)


@INTERPRETED
def test_a_table_sends_it_there_unless_it_is_learned_from(monkeypatch):
    monkeypatch.setattr(module, "FORMS", {0: "persistent"})
    monkeypatch.setattr(module, "prompt_attention_persistent_launch", lambda *given: given[0] + 1)
    given = inputs(*SHAPES[1])
    assert torch.equal(prompt_attention(**given), given["q"] + 1)
    learned = given | {"q": given["q"].clone().requires_grad_()}
    torch.testing.assert_close(prompt_attention(**learned), prompt_attention_ref(**given), rtol=1e-4, atol=1e-4)


def test_what_descriptors_ask_of_queries():
    q, prompt = inputs(*SHAPES[1])["q"], torch.zeros(1, 3, 5, 16)
    assert described(q, prompt)
    assert not described(q.contiguous(), prompt)  # a head's tokens side by side
    assert not described(q, torch.zeros(2, 3, 5, 16))
    assert not described(torch.randn(1, 5, 2, 24).transpose(1, 2), prompt)  # no power of two
    assert not described(q[:, :, :0], prompt)
