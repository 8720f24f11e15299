"""Faults that a first run on a GPU would have met: each is made on purpose here, and the lane finds it."""

import pytest
import torch
from torch import Tensor

from ebr_engine import Restorer
from ebr_engine.backbones.base import Conditioning
from ebr_engine.backbones.mini.lapped import LappedCodec
from ebr_engine.backbones.wan import model as wan
from ebr_engine.bridge import sampler
from ebr_engine.engine import plan as planning
from ebr_engine.engine.offload import BlockOffload
from ebr_engine.kernels import scaled_linear
from tests.tiny import picture


@pytest.fixture
def restore(device, wide, wide_prompt):
    """`restore(**options)`: the picture on the device."""

    def run(model=wide, prompt=wide_prompt, **options):
        return Restorer(model=model, device="cuda", **{"precision": "fp32"} | options).restore(picture(), prompt=prompt)

    return run


@pytest.fixture
def finds(restore):
    """`finds(words, **options)`: the lane says these words of a run; a graph that fails is told and left out."""

    def check(words, **options):
        with pytest.raises(Exception, match=words):
            restore(compile="off", **options)

    return check


@pytest.fixture
def recording_finds(restore):
    """`recording_finds(words)`: the lane refuses to record the run."""

    def check(words, **options):
        with pytest.warns(UserWarning, match=words):
            restore(**options)

    return check


@pytest.fixture
def in_the_loop(monkeypatch):
    """`in_the_loop(what)`: a step of the sampler begins with `what(state)`."""

    def put(what):
        step = sampler.bridge_step

        def spoilt(x: Tensor, *others: Tensor) -> Tensor:
            what(x)
            return step(x, *others)

        monkeypatch.setattr(sampler, "bridge_step", spoilt)

    return put


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.isnan().any()),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "tolist": lambda x: x.flatten()[:3].tolist(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "copy_": lambda x: torch.empty(x.shape).copy_(x),
}


def test_without_a_fault_nothing_is_found(restore, recwarn):
    restore(compile="off")
    restore()
    assert not [one for one in recwarn if "left out" in str(one.message)]


@pytest.mark.parametrize("what", WAITS.values(), ids=WAITS)
def test_the_host_waits_in_the_loop(what, in_the_loop, finds):
    in_the_loop(what)
    finds("the host reads a value")


@pytest.mark.parametrize(
    "what", [lambda x: torch.tensor([1.0], device=x.device), lambda x: torch.ones(3).to(x)], ids=["tensor", "to"]
)
def test_a_copy_from_the_host_in_a_recording(what, in_the_loop, recording_finds):
    in_the_loop(what)
    recording_finds("cannot be recorded")


@pytest.mark.parametrize("table", ["modulation", "head", "text_key", "prompt_value"])
def test_a_table_is_left_on_the_cpu(table, monkeypatch, finds):
    to = Conditioning.to

    def forgets(self, device, dtype):
        moved = to(self, device, dtype)
        object.__setattr__(moved, table, getattr(to(self, "cpu", dtype), table))
        return moved

    monkeypatch.setattr(Conditioning, "to", forgets)
    finds("on the device and on the host")


def test_the_positions_are_left_on_the_cpu(monkeypatch, finds):
    monkeypatch.setattr(wan.WanTrunk, "rotary", lambda self, grid, _: wan.rotary_tables(self.config, grid))
    finds("on the device and on the host")


def test_the_samplers_numbers_are_left_on_the_cpu(monkeypatch, finds):
    monkeypatch.setattr(planning, "place", lambda table, _: sampler.place(table, "cpu"))
    finds("bridge_step: tensors on the device and on the host")


def test_the_codec_is_left_on_the_cpu(monkeypatch, finds):
    monkeypatch.setattr(LappedCodec, "to", lambda self, _: self)
    finds("on the device and on the host")


def test_a_block_computes_with_the_weights_that_wait(monkeypatch, finds):
    monkeypatch.setattr(BlockOffload, "_place", lambda *_: None)
    finds("on the device and on the host", offload="blocks")


def product(**changes):
    """`library_product` with an argument changed."""

    def spoilt(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        given = {"x": x.flatten(0, -2), "w": weight.t(), "a": x_scale.reshape(-1, 1), "b": weight_scale.reshape(1, -1)}
        given |= {name: change(given[name]) for name, change in changes.items()}
        y = torch._scaled_mm(*given.values(), bias.bfloat16(), out_dtype=torch.bfloat16)
        return y.unflatten(0, x.shape[:-1])

    return spoilt


FP8 = {
    "a weight that is not laid out by column": ({"w": lambda w: w.contiguous()}, "col_major"),
    "activations laid out by column": ({"x": lambda x: x.t().contiguous().t()}, "row_major"),
    "scales of the wrong shape": ({"a": lambda a: a.t()}, "scal"),
    "scales of a half precision": ({"b": lambda b: b.bfloat16()}, "scal"),
    "activations that are not fp8": ({"x": lambda x: x.bfloat16()}, "fp8"),
}


@pytest.mark.parametrize(("changes", "words"), FP8.values(), ids=FP8)
def test_an_fp8_product_is_given_what_it_does_not_take(changes, words, monkeypatch, finds):
    monkeypatch.setattr(scaled_linear, "library_product", product(**changes))
    finds(words, precision="fp8")


def test_an_fp8_product_of_widths_that_are_no_multiples_of_16(monkeypatch, finds, weights, prompt):
    monkeypatch.setattr(scaled_linear, "implementation", lambda *_: "library")
    finds("divisible by 16", precision="fp8", model=weights, prompt=prompt)
