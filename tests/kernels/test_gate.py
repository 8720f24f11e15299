"""Kernels are compared with their references on first use: right ones stay, wrong ones are left to torch, and it is told.

Most of it needs kernels that run: in Triton's interpreter, where `test_interpreter.py` runs this file again, or on a device.
"""

import logging
import time

import pytest
import torch

from ebr_engine import Restorer
from ebr_engine.engine.execute import Graphs
from ebr_engine.errors import EngineError
from ebr_engine.kernels import backend, gate
from ebr_engine.kernels import bridge_step as step
from ebr_engine.kernels.context_kv import context_kv
from ebr_engine.kernels.gated_activation import gated_activation, gated_activation_fp8
from ebr_engine.kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_fp8
from ebr_engine.kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_fp8
from ebr_engine.kernels.prompt_attention import prompt_attention
from ebr_engine.kernels.qk_norm_rope import qk_norm_rope
from ebr_engine.kernels.quantize_fp8 import quantize_fp8
from ebr_engine.kernels.scaled_linear import scaled_linear

interpreted = pytest.mark.skipif(not (backend.INTERPRETED and backend.FORCED), reason="Triton's interpreter is not asked for")


@pytest.fixture(autouse=True)
def gated(ungated, monkeypatch):
    """A process in which nothing has been compared yet."""
    monkeypatch.setattr(backend, "VERIFY", "first")
    monkeypatch.setattr(backend, "distrusted", {})
    monkeypatch.setattr(gate, "_compared", set())


@pytest.fixture
def spoil(monkeypatch):
    """Make the bridge step's kernel wrong; gives the list that grows with its calls."""

    def spoilt(error=0.01):
        kernel, calls = step.bridge_step_launch, []

        def wrong(*args):
            calls.append(1)
            if isinstance(error, Exception):
                raise error
            return kernel(*args) + error

        monkeypatch.setattr(step, "bridge_step_launch", wrong)
        return calls

    return spoilt


def inputs(rows=3):
    return [*torch.randn(3, rows, 40), torch.tensor([0.9, -0.2, 0.3])]


def off(rows=3):
    """How far a step is from its formula."""
    given = inputs(rows)
    return (step.bridge_step(*given) - step.bridge_step_ref(*given)).abs().max().item()


@interpreted
def test_a_wrong_kernel_is_left_to_torch_with_one_warning(spoil, caplog):
    calls = spoil()
    assert [off() for _ in range(3)] == [0, 0, 0]  # the first result too
    assert len(calls) == 1
    (told,) = caplog.messages
    assert "bridge_step" in told
    (triton,) = (one for one in backend.backends() if one.name == "triton")
    assert "compared on first use with torch; bridge_step is left to torch: its relative error is" in triton.reason


@interpreted
def test_off_compares_nothing(spoil, caplog, monkeypatch):
    monkeypatch.setattr(backend, "VERIFY", "off")
    calls = spoil()
    assert min(off() for _ in range(3)) > 0.009
    assert (len(calls), caplog.messages) == (3, [])


@interpreted
@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_kernel_that_goes_wrong_later_is_seen_by_always_alone(verify, spoil, monkeypatch):
    monkeypatch.setattr(backend, "VERIFY", verify)
    off()
    spoil()
    assert (off() == 0) == (verify == "always") == bool(backend.distrusted)


@interpreted
def test_another_class_of_shapes_is_compared_anew(spoil):
    off()
    spoil()
    assert off(rows=64) == 0
    assert list(backend.distrusted) == ["bridge_step"]


@interpreted
def test_a_kernel_that_fails_is_left_to_torch(spoil):
    spoil(RuntimeError("out of resource: shared memory\nand more"))
    assert off() == 0
    assert backend.distrusted == {"bridge_step": "it failed (RuntimeError: out of resource: shared memory)"}


@interpreted
def test_what_a_caller_got_wrong_is_the_callers():
    with pytest.raises(ValueError, match="weight has shape"):
        layer_norm_modulate(torch.randn(2, 3, 6), torch.ones(1, 5), torch.zeros(1, 5))
    assert not backend.distrusted


@interpreted
def test_inputs_that_are_not_finite_neither_condemn_nor_acquit(spoil):
    given = inputs()
    given[1][0, 0] = torch.nan
    step.bridge_step(*given)
    assert not backend.distrusted
    spoil()
    assert off() == 0


@interpreted
def test_a_kernel_that_makes_nan_is_wrong(spoil):
    spoil(torch.nan)
    assert off() == 0


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_right_kernel_passes(dtype, caplog):
    """All operations, gradients and e4m3 too."""

    def randn(*shape):
        return torch.randn(shape, dtype=dtype)

    x, y, table = randn(2, 11, 24).requires_grad_(), randn(2, 11, 24), torch.randn(1, 24)
    out = layer_norm_modulate(x, table, table)
    total, normed = gated_residual_norm(out, y, table, table, table)
    qkv = torch.cat((total, normed, total), -1)
    q, k, _ = qk_norm_rope(qkv, randn(24), randn(24), torch.randn(11, 6), torch.randn(11, 6), 2, rows=randn(3, 72))
    key, value = context_kv(randn(1, 5, 24), randn(3, 48, 24), randn(3, 48), randn(3, 24), 2)
    prompts = [one[:2, 0].detach().requires_grad_() for one in (key, value)]
    out = prompt_attention(q, key[0], value[0], torch.rand(5), *prompts, torch.rand(2, requires_grad=True))
    joined = gated_activation(torch.cat((total, normed), -1), total)
    (out.float().square().sum() + k.float().sum() + joined.float().sum()).backward()
    with torch.no_grad():
        layer_norm_modulate_fp8(x, table, table)
        gated_residual_norm_fp8(x, y, table, table, table)
        gated_activation_fp8(torch.cat((x, y), -1), y)
        layer = *quantize_fp8(randn(48, 24)), randn(48)
        scaled_linear(x, *layer, gelu=True)
        scaled_linear(quantize_fp8(x), *layer)
        scaled_linear(x, *layer, fp8_out=True, gelu=True)
        off()
    assert caplog.messages == []
    assert sorted({key[0] for key in gate._compared}) == [
        "bridge_step", "context_kv", "gated_activation", "gated_activation_backward", "gated_activation_fp8",
        "gated_residual_norm", "gated_residual_norm_backward", "gated_residual_norm_fp8", "layer_norm_modulate",
        "layer_norm_modulate_backward", "layer_norm_modulate_fp8", "prompt_attention", "prompt_attention_backward",
        "qk_norm_rope", "qk_norm_rope_backward", "quantize_fp8", "scaled_linear", "scaled_linear_fp8",
    ]  # fmt: skip


@interpreted
def test_a_compiled_function_is_gated_when_it_runs_not_when_it_is_traced(spoil, caplog):
    calls = spoil()
    compiled = torch.compile(lambda *given: step.bridge_step(*given) * 2, fullgraph=True, backend="aot_eager")
    given = inputs()
    assert torch.equal(compiled(*given), step.bridge_step_ref(*given) * 2)
    assert len(calls) == 1
    assert sum("bridge_step" in line for line in caplog.messages) == 1


@interpreted
def test_a_graph_is_gated_in_its_warm_up_and_never_while_it_is_recorded(spoil, monkeypatch):
    recording, compared, plain = [], [], gate.compared

    def watched(*args):
        assert not recording
        compared.append(args[0].__name__)
        return plain(*args)

    def record(function, warm):
        warm()
        recording.append(1)
        result = function()
        recording.clear()
        return lambda: result.copy_(function()), result

    monkeypatch.setattr(backend, "VERIFY", "always")
    monkeypatch.setattr(gate, "recorded", lambda _: bool(recording))
    monkeypatch.setattr(gate, "compared", watched)
    calls = spoil()
    *tensors, table = inputs()

    def run(*given):
        return step.bridge_step(*given, table)

    result = Graphs(record).run("step", tensors, run, run)
    assert torch.equal(result, step.bridge_step_ref(*tensors, table))
    assert (len(calls), compared) == (1, ["bridge_step_op"])


def test_a_choice_that_there_is_not_is_told(monkeypatch):
    monkeypatch.setattr(backend, "VERIFY", "sometimes")
    with pytest.raises(EngineError, match="unknown EBR_VERIFY 'sometimes'; choose one of off, first, always"):
        Restorer("mini", device="cpu")


@interpreted
def test_all_operations_of_a_process_are_compared_in_fifty_milliseconds(monkeypatch):
    """The comparison alone, of an operation with several results; there are eighteen."""
    given = (*torch.randn(2, 1, 8, 24), None, torch.ones(1, 24), torch.zeros(1, 24))
    taken, plain = [], gate.compared

    def timed(*args):
        started = time.process_time()
        fault = plain(*args)
        taken.append(time.process_time() - started)
        return fault

    monkeypatch.setattr(gate, "compared", timed)
    monkeypatch.setattr(backend, "VERIFY", "always")
    for _ in range(8):
        gated_residual_norm(*given)
    logging.getLogger("ebr_engine").info("a comparison takes %.2f ms", 1e3 * min(taken))
    assert 18 * min(taken) < 0.05


def test_nothing_is_compared_where_references_run_and_a_compiler_sees_no_break(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(gate, "compared", lambda *_: pytest.fail("compared"))
    given = inputs()
    compiled = torch.compile(step.bridge_step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), step.bridge_step_ref(*given))
