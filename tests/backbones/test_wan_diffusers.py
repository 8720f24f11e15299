"""The two halves together compute what diffusers' `WanTransformer3DModel` computes, with and without prompts."""

from collections.abc import Mapping
from dataclasses import replace
from zlib import crc32

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from ebr_engine.backbones.layers import ROTARY_KEPT
from ebr_engine.backbones.registry import named_config
from ebr_engine.backbones.wan.model import WanConfig, WanStep, merge_equal_rows
from ebr_engine.backbones.wan.weights import diffusers_state_dict, load_wan
from ebr_engine.errors import BackboneError
from ebr_engine.prompts.mixing import mixed_weights
from ebr_engine.prompts.prompt import Prompt
from tests.backbones.conftest import random_weight

TOLERANCE = 1e-4  # relative RMS in float32
LATENT = (2, 4, 3, 6, 10)

CONFIGURATIONS = {
    "tiny": ({}, LATENT),
    "one frame, odd grid": ({"num_attention_heads": 3, "attention_head_dim": 20}, (1, 4, 1, 6, 14)),
    "patches of one, odd sizes": ({"patch_size": (1, 1, 1), "attention_head_dim": 24, "eps": 1e-4}, (3, 4, 2, 5, 7)),
    "patches in time too": ({"patch_size": (2, 2, 1), "num_attention_heads": 1, "attention_head_dim": 12}, (2, 4, 4, 6, 5)),
    "more channels in than out": ({"in_channels": 6, "out_channels": 3, "num_layers": 1, "freq_dim": 8}, (3, 6, 5, 2, 2)),
}
FULL_WIDTH = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 2,
    "rope_max_seq_len": 1024,
}


class PromptedAttention(nn.Module):
    """diffusers' cross-attention with one more call a prompt: attn(x, c) + Σ α·attn(x, c + P), each with its own output bias."""

    def __init__(self, attention, prompts):
        super().__init__()
        self.attention, self.prompts = attention, prompts

    def forward(self, hidden, context, *rest):
        out = self.attention(hidden, context, *rest)
        for residual, alpha in self.prompts:
            out = out + alpha * self.attention(hidden, context[:, : len(residual)] + residual, *rest)
        return out


def prompt_blocks(module, prompts):
    """Hook prompts, (residual [L, D], α [blocks]) each, onto every block of diffusers' module."""
    for i, block in enumerate(module.blocks):
        attention = getattr(block.attn2, "attention", block.attn2)
        block.attn2 = PromptedAttention(attention, [(residual, alpha[i]) for residual, alpha in prompts])


def reference(module, latent, timestep, context):
    return module(latent, timestep, context.expand(len(latent), -1, -1), return_dict=False)[0]


def ours(halves, latent, timestep, context, prompts=()):
    """Each sample of the batch at its own timestep: the rows of a baked table as one batched step."""
    conditioner, trunk = halves
    table = conditioner(timestep, context, prompts)
    return trunk(latent, table.batch())


def inputs(module, shape=LATENT, rows=9):
    """A latent, timesteps [B] and a text context [rows, text_dim]."""
    timestep = torch.tensor([399.0, 20.0, 0.0, 999.0])[: shape[0]]
    return torch.randn(shape), timestep, torch.randn(rows, module.config.text_dim)


def random_prompts(halves, count, rows=9):
    """Residuals as large as the context, and α that differ by block and sign."""
    config = halves[1].config
    return [(torch.randn(rows, config.width), torch.randn(config.num_layers)) for _ in range(count)]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_velocities_are_those_of_diffusers(name, make_wan, relative_rms):
    changes, shape = CONFIGURATIONS[name]
    module, *halves = make_wan(**changes)
    given = inputs(module, shape)
    velocity = ours(halves, *given)
    assert velocity.shape == (shape[0], module.config.out_channels, *shape[2:])
    assert velocity.dtype == torch.float32
    assert relative_rms(velocity, reference(module, *given)) < TOLERANCE


def test_velocities_at_the_real_widths_are_those_of_diffusers(make_wan, relative_rms):
    module, *halves = make_wan(**FULL_WIDTH)
    given = inputs(module, (1, 16, 1, 4, 6), rows=24)
    prompts = random_prompts(halves, 1, rows=24)
    prompt_blocks(module, prompts)
    assert relative_rms(ours(halves, *given, prompts), reference(module, *given)) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equal_times_of_all_tokens_are_one_row(name, make_wan, relative_rms):
    # Wan 2.2 TI2V-5B is told a time for every token.
    changes, shape = CONFIGURATIONS[name]
    module, *halves = make_wan(**changes)
    latent, timestep, context = inputs(module, shape)
    tokens = latent[0, 0].numel() // halves[1].config.patch_volume
    expanded = timestep[:, None].expand(-1, tokens)
    assert relative_rms(ours(halves, latent, timestep, context), reference(module, latent, expanded, context)) < TOLERANCE


class Drawn(Mapping):
    """Random weights of a configuration, drawn when they are asked for, so that they are in memory once."""

    def __init__(self, config):
        with torch.device("meta"):
            self.shapes = WanTransformer3DModel(**config.to_diffusers()).state_dict()

    def __getitem__(self, name):
        torch.manual_seed(crc32(name.encode()))
        return random_weight(name, self.shapes[name].shape)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


@pytest.mark.slow  # 4 GB
@pytest.mark.parametrize(("name", "expanded"), [("wan22-a14b", False), ("wan22-5b", True)])
def test_velocities_at_the_real_widths_of_wan_22_are_those_of_diffusers(name, expanded, relative_rms):
    config = replace(named_config(name), num_layers=2)
    weights = Drawn(config)
    with torch.device("meta"):
        module = WanTransformer3DModel(**config.to_diffusers()).requires_grad_(False)
    module.load_state_dict(dict(weights), assign=True)
    module.rope = type(module.rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    torch.manual_seed(0)
    latent, timestep, context = inputs(module.eval(), (1, config.in_channels, 2, 4, 6), rows=24)
    prompts = [(torch.randn(24, config.width), torch.randn(2))]
    prompt_blocks(module, prompts)
    times = timestep[:, None].expand(-1, 12) if expanded else timestep
    velocity = reference(module, latent, times, context)
    del module
    assert relative_rms(ours(load_wan(config, weights), latent, timestep, context, prompts), velocity) < TOLERANCE


def test_every_input_matters(wan, relative_rms):
    # Otherwise the comparisons could agree without having compared anything.
    module, halves = wan
    latent, timestep, context = inputs(module)
    velocity = reference(module, latent, timestep, context)
    for other in (
        (latent.flip(3), timestep, context),
        (latent.flip(2), timestep, context),
        (latent, timestep.flip(0), context),
        (latent, timestep, context * 2),
    ):
        assert relative_rms(reference(module, *other), velocity) > 100 * TOLERANCE
    prompt_blocks(module, random_prompts(halves, 1))
    assert relative_rms(reference(module, latent, timestep, context), velocity) > 100 * TOLERANCE


@pytest.mark.parametrize("rows", [9, 4])
def test_a_prompt_is_a_second_cross_attention_with_its_own_output_bias(wan, rows, relative_rms):
    module, halves = wan
    given = inputs(module)
    prompts = random_prompts(halves, 1, rows)
    prompt_blocks(module, prompts)
    assert relative_rms(ours(halves, *given, prompts), reference(module, *given)) < TOLERANCE


def test_a_prompt_longer_than_the_text_repeats_the_last_row(wan):
    module, halves = wan
    conditioner, _ = halves
    _, timestep, context = inputs(module, rows=5)
    prompts = random_prompts(halves, 1, rows=9)
    longer = torch.cat((context, context[-1:].expand(4, -1)))
    short, long = conditioner(timestep, context, prompts), conditioner(timestep, longer, prompts)
    for name, value, other in zip(WanStep._fields[5:], short.batch()[5:], long.batch()[5:]):
        torch.testing.assert_close(value, other, msg=name)
    assert short.prompt_key.shape[3] == 9


def test_several_prompts_add_their_branches(wan, relative_rms):
    module, halves = wan
    given = inputs(module)
    prompts = [Prompt(*prompt, "wan") for prompt in random_prompts(halves, 3)]
    weights = (0.5, -0.2, 1.3)
    prompt_blocks(module, [(prompt.residual, weight * prompt.alpha) for prompt, weight in zip(prompts, weights)])
    mixed = ours(halves, *given, mixed_weights(list(zip(prompts, weights))))
    assert relative_rms(mixed, reference(module, *given)) < TOLERANCE


def test_prompts_of_unequal_length_cannot_be_mixed_in_one_run(wan):
    module, (conditioner, _) = wan
    _, timestep, context = inputs(module)
    prompts = random_prompts(wan[1], 1, 9) + random_prompts(wan[1], 1, 8)
    with pytest.raises(BackboneError, match="same number of tokens"):
        conditioner(timestep, context, prompts)


def test_equal_rows_of_a_context_are_merged_exactly(wan, relative_rms):
    module, halves = wan
    latent, timestep, _ = inputs(module)
    context = torch.zeros(226, 10)
    context[0] = torch.randn(10)  # the empty text: one end token, the rest padding
    assert halves[0](timestep, context).text_key.shape[3] == 2
    prompts = random_prompts(halves, 1, 226)
    assert relative_rms(ours(halves, latent, timestep, context), reference(module, latent, timestep, context)) < 1e-5
    prompt_blocks(module, prompts)
    velocity = reference(module, latent, timestep, context)
    assert relative_rms(ours(halves, latent, timestep, context, prompts), velocity) < 1e-5


def test_merging_keeps_the_order_of_first_occurrence_and_counts():
    a, b, c = torch.randn(3, 6).unbind()
    rows, count = merge_equal_rows(torch.stack((c, a, c, b, a, c)))
    assert torch.equal(rows, torch.stack((c, a, b)))
    assert count.tolist() == [3, 2, 1]
    assert torch.equal(merge_equal_rows(torch.stack((b, a)))[0], torch.stack((b, a)))


def test_rows_of_a_table_are_its_steps(wan):
    module, (conditioner, trunk) = wan
    latent, timestep, context = inputs(module, (3, 4, 1, 4, 4))
    table = conditioner(timestep, context, random_prompts(wan[1], 2))
    batched = trunk(latent, table.batch())
    assert len(table) == 3
    for i in range(3):
        torch.testing.assert_close(trunk(latent[i : i + 1], table[i])[0], batched[i], atol=1e-5, rtol=1e-5)
    for step in (3, -1):
        with pytest.raises(IndexError, match=f"step {step} of 3"):
            table[step]


def test_bf16_is_at_most_twice_as_far_off_as_diffusers_in_bf16(wan, relative_rms):
    module, (conditioner, trunk) = wan
    latent, timestep, context = inputs(module)
    exact = reference(module, latent, timestep, context)
    table = conditioner(timestep, context).to("cpu", torch.bfloat16)
    _, low = load_wan(trunk.config, module.state_dict(), dtype=torch.bfloat16)
    velocity = low(latent, table.batch())
    theirs = reference(module.bfloat16(), latent.bfloat16(), timestep, context.bfloat16())
    assert velocity.dtype == torch.float32
    assert relative_rms(velocity, exact) < 2 * relative_rms(theirs, exact)


def test_only_prompts_get_gradients_and_they_are_diffusers(wan, relative_rms):
    module, halves = wan
    given = inputs(module)
    prompts = random_prompts(halves, 2)
    pull = torch.randn(LATENT)
    learned = [tensor.requires_grad_() for prompt in prompts for tensor in prompt]
    (ours(halves, *given, prompts) * pull).sum().backward()
    assert all(not p.requires_grad and p.grad is None for half in halves for p in half.parameters())
    prompt_blocks(module, prompts)
    gradients = torch.autograd.grad((reference(module, *given) * pull).sum(), learned)
    for tensor, gradient in zip(learned, gradients):
        assert relative_rms(tensor.grad, gradient) < TOLERANCE
        assert (tensor.grad != 0).all()


def test_finite_differences_confirm_the_gradient_of_alpha(wan):
    # Norms are float32 by design, so the loss (of size 10) is known to about 1e-6; a step of 1e-2 leaves 1e-4 of that, and
    # the difference's own error is of the step's square times the third derivative, which is of the gradient's size.
    module, halves = wan
    given = inputs(module)
    ((residual, alpha),) = random_prompts(halves, 1)
    pull = torch.randn(LATENT, dtype=torch.float64) / 10

    def loss(alpha):
        return (ours(halves, *given, [(residual, alpha)]) * pull).sum()

    (gradient,) = torch.autograd.grad(loss(alpha.requires_grad_()), alpha)
    for i in range(len(alpha)):
        step = torch.zeros_like(alpha).index_fill_(0, torch.tensor(i), 1e-2)
        with torch.no_grad():
            difference = (loss(alpha + step) - loss(alpha - step)) / 2e-2
        torch.testing.assert_close(gradient[i].double(), difference, rtol=1e-2, atol=2e-3)


def test_weights_go_in_and_come_out_bit_for_bit(make_wan):
    for changes, _ in CONFIGURATIONS.values():
        module, *halves = make_wan(**changes)
        wanted, state = module.state_dict(), diffusers_state_dict(*halves)
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_loading_copies_so_that_the_checkpoint_may_go(wan, relative_rms):
    module, halves = wan
    given = inputs(module)
    before = ours(halves, *given)
    for tensor in module.state_dict().values():
        tensor.zero_()
    assert torch.equal(ours(halves, *given), before)


def test_a_configuration_survives_the_round_trip(wan):
    for changes, _ in CONFIGURATIONS.values():
        config = WanConfig.from_diffusers(dict(wan[0].config) | changes)
        assert WanConfig.from_diffusers(config.to_diffusers()) == config
        assert config.patch_size == changes.get("patch_size", (1, 2, 2))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 1, 5, 6), r"latent size \(1, 5, 6\) is not a multiple of the patch size \(1, 2, 2\)"),
        ((1, 4, 1, 6, 7), r"latent size \(1, 6, 7\) is not a multiple"),
        ((1, 3, 1, 6, 6), r"expected a latent \[B, 4, F, H, W\], got \(1, 3, 1, 6, 6\)"),
        ((4, 1, 6, 6), "expected a latent"),
        ((1, 4, 1, 66, 6), r"a grid of \(1, 33, 3\) patches is larger than the position table \(32\)"),
    ],
)
def test_latents_that_do_not_fit_are_refused(wan, shape, message):
    module, (conditioner, trunk) = wan
    _, timestep, context = inputs(module)
    with pytest.raises(BackboneError, match=message):
        trunk(torch.randn(shape), conditioner(timestep[:1], context)[0])


def test_positions_are_computed_once_a_shape(wan):
    _, (_, trunk) = wan
    first = trunk.rotary((1, 3, 5), torch.device("cpu"))
    assert trunk.rotary((1, 3, 5), torch.device("cpu"))[0] is first[0]
    assert trunk.rotary((1, 5, 3), torch.device("cpu"))[0] is not first[0]


def test_positions_of_the_grids_used_last_are_kept(wan):
    _, (_, trunk) = wan
    cpu = torch.device("cpu")
    often = trunk.rotary((1, 3, 5), cpu)
    for side in range(1, 4 * ROTARY_KEPT):
        once = trunk.rotary((1, 1, side), cpu)
        assert trunk.rotary((1, 3, 5), cpu) is often
        assert len(trunk._rotary) <= ROTARY_KEPT
    assert trunk.rotary((1, 1, side), cpu) is once
    assert trunk.rotary((1, 1, 1), cpu) is not None
    assert len(trunk._rotary) == ROTARY_KEPT
