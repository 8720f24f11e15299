"""The two halves together compute what diffusers' `Flux2Transformer2DModel` computes, with and without prompts."""

import inspect
import re

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from ebr_engine.backbones.flux.model import FluxTrunk
from ebr_engine.backbones.flux2.model import Flux2Conditioner, Flux2Config
from ebr_engine.backbones.flux2.weights import conditioner_parameters, diffusers_state_dict, load_flux2, trunk_parameters
from ebr_engine.backbones.registry import named_config
from ebr_engine.errors import BackboneError
from tests.backbones.test_flux_diffusers import Recorder, random_prompts, random_weight, velocity

TOLERANCE = 1e-4  # relative RMS in float32
TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": True,
}
LATENT = (2, 16, 3, 5)
TEXT = 9  # tokens
REAL_HEAD = {"attention_head_dim": 128, "axes_dims_rope": (32, 32, 32, 32), "in_channels": 128}
WIDE = REAL_HEAD | {
    "num_attention_heads": 24,
    "num_layers": 1,
    "num_single_layers": 2,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}

# name: changes of the configuration, latent [B, C, H, W], text tokens, rows of each prompt
CASES = {
    "odd grid, batch 2, guidance, prompt on every token": ({}, LATENT, TEXT, [TEXT]),
    "one token wide, no guidance, short prompt": ({"guidance_embeds": False}, (1, 16, 7, 1), TEXT, [4]),
    "real head, 512 tokens, short prompt": (REAL_HEAD | {"num_layers": 1, "num_single_layers": 2}, (1, 128, 3, 2), 512, [200]),
    "one head, more image than text, two prompts mixed": ({"num_attention_heads": 1}, (3, 16, 5, 3), 3, [3, 1]),
    "one block each, no first axis, another ratio and base": (
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "axes_dims_rope": (0, 6, 6, 4),
            "mlp_ratio": 2.5,
            "rope_theta": 100,
            "guidance_embeds": False,
        },
        LATENT,
        5,
        [2],
    ),
}


def make(changes=()):
    """diffusers' module of a tiny configuration with changes, and our conditioner and trunk."""
    with torch.device("meta"):
        module = Flux2Transformer2DModel(**TINY | dict(changes))
    state = {name: random_weight(name, tensor.shape) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False), *load_flux2(Flux2Config.from_diffusers(dict(module.config)), state)


def inputs(module, shape=LATENT, tokens=TEXT):
    """A latent, a timestep a sample, and the text context."""
    timestep = torch.tensor([400.0, 21.0, 253.0])[: shape[0]]
    return torch.randn(shape), timestep, torch.randn(tokens, module.config.joint_attention_dim)


def added(hidden, prompts, block):
    """`hidden` with Σ weight·residual on its first rows, before any projection."""
    for residual, weight in prompts:
        zeros = hidden.new_zeros(hidden.shape[1] - len(residual), hidden.shape[2])
        hidden = hidden + torch.cat((weight[block] * residual, zeros)).to(hidden.dtype)
    return hidden


def projected(module, prompts):
    """Add prompts to the text rows that q, k and v are made of in every block of diffusers' module; the hooks' handles."""
    handles, doubles = [], len(module.transformer_blocks)

    def on_text(block):
        return lambda _, args: (added(args[0], prompts, block), *args[1:])

    def on_joint(block, width):
        def change(layer, args, output):  # q, k and v alone: not the feed-forward's rows of the same product
            rows = added(torch.zeros_like(args[0]), prompts, block) @ layer.weight[: 3 * width].T
            return torch.cat((output[..., : 3 * width] + rows, output[..., 3 * width :]), -1)

        return change

    for i, block in enumerate(module.transformer_blocks):
        for name in ("add_q_proj", "add_k_proj", "add_v_proj"):
            handles.append(getattr(block.attn, name).register_forward_pre_hook(on_text(i)))
    for i, block in enumerate(module.single_transformer_blocks):
        layer = block.attn.to_qkv_mlp_proj
        handles.append(layer.register_forward_hook(on_joint(doubles + i, block.attn.inner_dim)))
    return handles


def reference(module, latent, timestep, context, prompts=(), guidance=1.0):
    """diffusers' velocity, called as its pipelines do."""
    batch, _, height, width = latent.shape
    handles = projected(module, prompts)
    output = module(
        latent.flatten(2).transpose(1, 2).to(module.dtype),
        encoder_hidden_states=context.expand(batch, -1, -1).to(module.dtype),
        timestep=timestep / 1000,
        img_ids=torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1)),
        txt_ids=torch.cartesian_prod(*3 * [torch.arange(1)], torch.arange(len(context))),
        guidance=torch.full((batch,), guidance) if module.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    for handle in handles:
        handle.remove()
    return output.transpose(1, 2).unflatten(2, (height, width))


def ours(halves, latent, timestep, context, prompts=(), guidance=1.0):
    """Each sample of the batch at its own timestep: the rows of a baked table as one batched step."""
    conditioner, trunk = halves
    conditioning = conditioner.bake(trunk, timestep, {"context": context}, prompts, guidance)
    return velocity(trunk, latent, conditioning.to("cpu", trunk.image_in.weight.dtype).batch())


@pytest.mark.parametrize(("changes", "shape", "tokens", "rows"), CASES.values(), ids=CASES)
def test_velocity_is_diffusers_with_and_without_prompts(changes, shape, tokens, rows, relative_rms):
    module, *halves = make(changes)
    given = inputs(module, shape, tokens)
    prompts = random_prompts(module, rows)
    plain, prompted = reference(module, *given), reference(module, *given, prompts)
    assert relative_rms(prompted, plain) > 100 * TOLERANCE  # the prompt matters
    assert relative_rms(ours(halves, *given), plain) < TOLERANCE
    assert relative_rms(ours(halves, *given, prompts), prompted) < TOLERANCE


class Consumed(dict):
    """A state dict of which a tensor is there until it is read."""

    def __getitem__(self, name):
        return self.pop(name)


@pytest.mark.slow
def test_velocity_is_diffusers_at_the_real_width(relative_rms):
    """klein 4B's sizes but for its depth, 1 + 2 blocks; half a billion parameters, of which there is one copy at a time."""
    config = Flux2Config.from_diffusers(WIDE)
    with torch.device("meta"):
        module = Flux2Transformer2DModel(**WIDE)
    state = Consumed({name: random_weight(name, tensor.shape) for name, tensor in module.state_dict().items()})
    module.load_state_dict(dict(state), assign=True)
    given = inputs(module, (1, 128, 6, 5), 512)
    prompts = random_prompts(module, [512])
    with torch.no_grad():
        plain, prompted = reference(module, *given), reference(module, *given, prompts)
        del module
        halves = load_flux2(config, state)
        assert not state
        assert relative_rms(prompted, plain) > 100 * TOLERANCE
        assert relative_rms(ours(halves, *given), plain) < TOLERANCE
        assert relative_rms(ours(halves, *given, prompts), prompted) < TOLERANCE


def test_guidance_is_scaled_as_diffusers_does_and_not_read_without_embedding(relative_rms):
    module, *halves = make()
    given = inputs(module)
    other = reference(module, *given, guidance=3.5)
    assert relative_rms(ours(halves, *given, guidance=3.5), other) < TOLERANCE
    assert relative_rms(ours(halves, *given), other) > 10 * TOLERANCE
    module, *halves = make({"guidance_embeds": False})
    assert torch.equal(ours(halves, *given, guidance=3.5), ours(halves, *given))


def test_one_step_serves_a_whole_batch_and_frames_are_pictures(relative_rms):
    module, *halves = make()
    latent, timestep, context = inputs(module)
    prompts = random_prompts(module, [TEXT])
    step = halves[0].bake(halves[1], timestep, {"context": context}, prompts)[1]
    expected = reference(module, latent, timestep[1].expand(2), context, prompts)
    assert relative_rms(velocity(halves[1], latent, step), expected) < TOLERANCE
    clip = halves[1](latent.transpose(0, 1)[None], step)  # [1, C, 2, H, W]
    assert relative_rms(clip[0].transpose(0, 1), expected) < TOLERANCE


def test_gradients_reach_prompts_and_weights_as_in_diffusers(relative_rms):
    module, *halves = make()
    given = inputs(module)
    prompts = random_prompts(module, [5])
    leaves = [tensor.requires_grad_() for tensor in prompts[0]]
    pull = torch.randn(LATENT)
    expected = torch.autograd.grad((reference(module, *given, prompts) * pull).sum(), leaves)
    gradients = torch.autograd.grad((ours(halves, *given, prompts) * pull).sum(), leaves)
    for value, slope in zip(gradients, expected):
        assert relative_rms(value, slope) < TOLERANCE
    assert all(p.grad is None and not p.requires_grad for half in halves for p in half.parameters())


def test_bf16_is_as_near_to_float32_as_diffusers_bf16(relative_rms):
    module, *_ = make()
    state = {name: tensor.bfloat16() for name, tensor in module.state_dict().items()}
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    halves = load_flux2(Flux2Config.from_diffusers(dict(module.config)), state, dtype=torch.bfloat16)
    latent, _, context = inputs(module)
    given = latent, torch.tensor([500.0, 250.0]), context  # exact in bf16, in which diffusers multiplies by 1000
    prompts = random_prompts(module, [TEXT])
    exact = reference(module.double(), *given, prompts)
    theirs = reference(module.bfloat16(), *given, prompts).float()
    assert relative_rms(ours(halves, *given, prompts), exact) < 2 * relative_rms(theirs, exact)


def test_tables_have_one_row_of_modulations_for_all_blocks():
    module, conditioner, trunk = make()
    _, timestep, context = inputs(module)
    conditioning = conditioner.bake(trunk, timestep, {"context": context}, random_prompts(module, [4]))
    assert conditioning.double_modulation.shape == (2, 1, 2, 6, 32)
    assert conditioning.single_modulation.shape == (2, 1, 3, 32)
    step = conditioning[0]
    assert torch.equal(step.double(1).modulation, step.double(0).modulation)
    assert torch.equal(step.single(2).modulation, step.single(0).modulation)
    assert not torch.equal(step.single(2).rows, step.single(0).rows)
    for i, expected in ((1, step.double_modulation[:, 0, 1, :2]), (2, step.single_modulation[:, 0, :2])):
        *_, image = step.double_norms(i)
        assert torch.equal(torch.stack(list(image), 1), expected)
    assert torch.equal(torch.stack(step.single_norm(3), 1), step.head)


@pytest.mark.parametrize(
    ("name", "conditioner_count", "trunk_count"),
    [
        ("flux2-klein-4b", 194_248_704, 3_681_295_872),
        ("flux2-klein-9b", 353_370_112, 8_725_211_136),
        ("flux2-dev", 814_743_552, 31_408_537_600),
    ],
)
def test_the_real_models_are_split_without_a_copy(name, conditioner_count, trunk_count):
    config = named_config(name)
    with torch.device("meta"):  # billions of parameters, none of them allocated
        model = Flux2Transformer2DModel(**config.to_diffusers())
        conditioner, trunk = Flux2Conditioner(config), FluxTrunk(config)
    total, *split = (sum(p.numel() for p in part.parameters()) for part in (model, conditioner, trunk))
    assert split == [conditioner_count, trunk_count]
    assert sum(split) == total
    shapes = {key: tensor.shape for key, tensor in diffusers_state_dict(conditioner, trunk).items()}
    assert shapes == {key: tensor.shape for key, tensor in model.state_dict().items()}


def test_diffusers_own_defaults_are_those_of_dev():
    signature = inspect.signature(Flux2Transformer2DModel.__init__).parameters.values()
    defaults = {one.name: one.default for one in signature if one.name != "self"}
    assert Flux2Config.from_diffusers(defaults) == named_config("flux2-dev")


def test_no_modulation_parameter_is_in_the_trunk():
    module, _, trunk = make()
    by_trunk, by_conditioner = Recorder(module.state_dict()), Recorder(module.state_dict())
    assert {name for name, _ in trunk_parameters(trunk.config, by_trunk)} == trunk.state_dict().keys()
    list(conditioner_parameters(trunk.config, by_conditioner))
    parts = ("time_guidance_embed.", "context_embedder.", "double_stream_mod", "single_stream_mod", "norm_out.")
    assert by_conditioner.seen == {name for name in by_trunk if name.startswith(parts)}
    assert by_trunk.seen == by_trunk.keys() - by_conditioner.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit_in_the_dtype_they_were_stored(dtype):
    module, *_ = make()
    state = {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
    halves = load_flux2(Flux2Config.from_diffusers(dict(module.config)), state, dtype=dtype)
    back = diffusers_state_dict(*halves)
    assert back.keys() == state.keys()
    assert all(back[name].dtype == dtype and torch.equal(back[name], tensor) for name, tensor in state.items())


def test_a_checkpoint_with_other_keys_is_refused():
    module, *_ = make()
    config, state = Flux2Config.from_diffusers(dict(module.config)), module.state_dict()
    with pytest.raises(BackboneError, match=r"misses 1 key\(s\): x_embedder.weight"):
        load_flux2(config, {name: tensor for name, tensor in state.items() if name != "x_embedder.weight"})
    with pytest.raises(BackboneError, match=r"has unexpected 1 key\(s\): x_embedder.bias"):
        load_flux2(config, state | {"x_embedder.bias": torch.zeros(32)})


@pytest.mark.parametrize("change", ["a row more", "a dimension more"])
def test_every_wrong_shape_is_named(change):
    module, *_ = make({"num_layers": 1, "num_single_layers": 1})
    config, state = Flux2Config.from_diffusers(dict(module.config)), module.state_dict()
    for name, tensor in state.items():
        wrong = torch.cat((tensor, tensor[:1])) if change == "a row more" else tensor[None]
        with pytest.raises(BackboneError, match=re.escape(f"{name} has shape {tuple(wrong.shape)} in the checkpoint")):
            load_flux2(config, state | {name: wrong})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_channels": 64}, "in_channels=128 and out_channels=64"),
        ({"patch_size": 2}, "patch_size=2"),
        ({"in_channels": 126}, "in_channels=126"),
        ({"axes_dims_rope": (32, 32, 64)}, r"axes_dims_rope=\(32, 32, 64\): four even numbers"),
        ({"axes_dims_rope": (31, 33, 32, 32)}, r"axes_dims_rope=\(31, 33, 32, 32\)"),
        ({"axes_dims_rope": (32, 32, 32, 30)}, r"axes_dims_rope=\(32, 32, 32, 30\)"),
        ({"eps": 1e-5}, "eps=1e-05"),
        ({"num_layers": 0}, "no double-stream"),
    ],
)
def test_a_configuration_of_another_model_is_refused(changes, message):
    with pytest.raises(BackboneError, match=message):
        Flux2Config.from_diffusers(named_config("flux2-dev").to_diffusers() | changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 15, 1, 6, 8), r"expected a latent \[B, 16, F, H, W\], got \(1, 15, 1, 6, 8\)"),
        ((1, 16, 6, 8), r"expected a latent \[B, 16, F, H, W\]"),
    ],
)
def test_a_latent_that_does_not_fit_is_refused(shape, message):
    module, conditioner, trunk = make()
    step = conditioner(*inputs(module)[1:])[0]
    with pytest.raises(BackboneError, match=message):
        trunk(torch.randn(shape), step)


def test_a_prompt_that_does_not_fit_is_refused():
    module, conditioner, trunk = make()
    _, timestep, context = inputs(module)
    with pytest.raises(BackboneError, match="a prompt of 10 rows does not fit on 9 text tokens"):
        conditioner.bake(trunk, timestep, {"context": context}, [(torch.randn(TEXT + 1, 32), torch.randn(5))])


def test_places_count_rows_and_columns_and_text_along_an_axis_of_its_own():
    config = named_config("flux2-klein-4b")
    angles = [torch.atan2(sin, cos) for cos, sin in (config.rotary((1, 3, 5)), config.text_rotary(4))]
    frequency = 2000 ** -(torch.arange(0, 32, 2) / 32)
    rest = torch.zeros(32)
    picture = torch.cat((torch.zeros(16), 1 * frequency, 2 * frequency, torch.zeros(16)))
    torch.testing.assert_close(angles[0][1 * 5 + 2], picture)
    torch.testing.assert_close(angles[1][3], torch.cat((torch.zeros(16), rest, 3 * frequency)))
