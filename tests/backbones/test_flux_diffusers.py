"""The two halves together compute what diffusers' `FluxTransformer2DModel` computes, with and without prompts."""

import re

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.nn import functional as F

from ebr_engine.backbones.flux.config import FluxConfig
from ebr_engine.backbones.flux.model import FluxConditioner, FluxTrunk
from ebr_engine.backbones.flux.weights import conditioner_parameters, diffusers_state_dict, load_flux, trunk_parameters
from ebr_engine.backbones.registry import named_config
from ebr_engine.errors import BackboneError

TOLERANCE = 1e-4  # relative RMS in float32
TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 6,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
LATENT = (2, 4, 6, 10)
TEXT = 9  # tokens

# name: changes of the configuration, latent [B, C, H, W], text tokens, rows of each prompt
CASES = {
    "odd grid, batch 2, prompt on every token": ({}, LATENT, TEXT, [TEXT]),
    "one token wide, schnell, short prompt": ({"guidance_embeds": False}, (1, 4, 14, 2), TEXT, [4]),
    "real head width, 512 tokens, short prompt": (
        {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "in_channels": 64, "num_layers": 1, "num_single_layers": 2},
        (1, 16, 6, 4),
        512,
        [200],
    ),
    "one head, more image than text, two prompts mixed": ({"num_attention_heads": 1}, (3, 4, 10, 6), 3, [3, 1]),
    "one block each, no first axis": ({"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (0, 6, 10)}, LATENT, 5, [2]),
}


def random_weight(name, shape):
    """Signals keep their size from layer to layer, and no parameter is zero, one or shared."""
    if name.endswith("bias"):
        return torch.randn(shape) * 0.2
    if name.rpartition(".")[0].endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k")):
        return 1 + torch.randn(shape) * 0.3
    return torch.randn(shape) * shape[-1] ** -0.5


def make(changes=()):
    """diffusers' module of a tiny configuration with changes, and our conditioner and trunk."""
    with torch.device("meta"):
        module = FluxTransformer2DModel(**TINY | dict(changes))
    state = {name: random_weight(name, tensor.shape) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False), *load_flux(FluxConfig.from_diffusers(dict(module.config)), state)


def inputs(module, shape=LATENT, tokens=TEXT):
    """A latent, a timestep a sample, the text context and the pooled text."""
    timestep = torch.tensor([400.0, 21.0, 253.0])[: shape[0]]
    context, pooled = torch.randn(tokens, module.config.joint_attention_dim), torch.randn(module.config.pooled_projection_dim)
    return torch.randn(shape), timestep, context, pooled


def random_prompts(module, rows):
    """Residuals as large as the normed text, and weights that differ by block and sign."""
    config = module.config
    width, blocks = config.num_attention_heads * config.attention_head_dim, config.num_layers + config.num_single_layers
    return [(torch.randn(length, width), torch.randn(blocks)) for length in rows]


def added(hidden, prompts, block):
    """`hidden` with Σ weight·residual on its first rows: the released injection, before any projection."""
    for residual, weight in prompts:
        zeros = hidden.new_zeros(hidden.shape[1] - len(residual), hidden.shape[2])
        hidden = hidden + torch.cat((weight[block] * residual, zeros)).to(hidden.dtype)
    return hidden


def hook_prompts(module, prompts):
    """Add prompts to the text rows that attention reads in every block of diffusers' module; the hooks' handles."""

    def on_double(block):
        return lambda _, __, output: (added(output[0], prompts, block), *output[1:])

    def on_single(block):
        return lambda _, args, kwargs: (args, kwargs | {"hidden_states": added(kwargs["hidden_states"], prompts, block)})

    doubles = len(module.transformer_blocks)
    handles = [block.norm1_context.register_forward_hook(on_double(i)) for i, block in enumerate(module.transformer_blocks)]
    for i, block in enumerate(module.single_transformer_blocks):
        handles.append(block.attn.register_forward_pre_hook(on_single(doubles + i), with_kwargs=True))
    return handles


def packed(latent):
    """[B, C, H, W] → [B, N, C·2·2]: the released order, channels before rows before columns."""
    return F.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)


def unpacked(tokens, latent):
    """[B, N, C·2·2] → a tensor like `latent`."""
    height, width = latent.shape[2:]
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def reference(module, latent, timestep, context, pooled, prompts=(), guidance=1.0):
    """diffusers' velocity, called as its pipeline does."""
    batch, _, height, width = latent.shape
    handles = hook_prompts(module, prompts)
    output = module(
        packed(latent).to(module.dtype),
        encoder_hidden_states=context.expand(batch, -1, -1).to(module.dtype),
        pooled_projections=pooled.expand(batch, -1).to(module.dtype),
        timestep=timestep / 1000,
        img_ids=torch.tensor([[0.0, row, column] for row in range(height // 2) for column in range(width // 2)]),
        txt_ids=torch.zeros(len(context), 3),
        guidance=torch.full((batch,), guidance) if module.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    for handle in handles:
        handle.remove()
    return unpacked(output, latent)


def ours(halves, latent, timestep, context, pooled, prompts=(), guidance=1.0):
    """Each sample of the batch at its own timestep: the rows of a baked table as one batched step."""
    conditioner, trunk = halves
    conditioning = conditioner.bake(trunk, timestep, {"context": context, "pooled": pooled}, prompts, guidance)
    return velocity(trunk, latent, conditioning.to("cpu", trunk.image_in.weight.dtype).batch())


def velocity(trunk, latent, step):
    """Of pictures [B, C, H, W]."""
    return trunk(latent.unsqueeze(2), step).squeeze(2)


@pytest.mark.parametrize(("changes", "shape", "tokens", "rows"), CASES.values(), ids=CASES)
def test_velocity_is_diffusers_with_and_without_prompts(changes, shape, tokens, rows, relative_rms):
    module, *halves = make(changes)
    given = inputs(module, shape, tokens)
    prompts = random_prompts(module, rows)
    plain, prompted = reference(module, *given), reference(module, *given, prompts)
    assert relative_rms(prompted, plain) > 100 * TOLERANCE  # the prompt matters
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


def test_one_step_serves_a_whole_batch(relative_rms):
    module, *halves = make()
    latent, timestep, context, pooled = inputs(module)
    prompts = random_prompts(module, [TEXT])
    step = halves[0].bake(halves[1], timestep, {"context": context, "pooled": pooled}, prompts)[1]
    expected = reference(module, latent, timestep[1].expand(2), context, pooled, prompts)
    assert relative_rms(velocity(halves[1], latent, step), expected) < TOLERANCE


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
    halves = load_flux(FluxConfig.from_diffusers(dict(module.config)), state, dtype=torch.bfloat16)
    latent, _, context, pooled = inputs(module)
    given = latent, torch.tensor([500.0, 250.0]), context, pooled  # exact in bf16, in which diffusers multiplies by 1000
    prompts = random_prompts(module, [TEXT])
    exact = reference(module.double(), *given, prompts)
    theirs = reference(module.bfloat16(), *given, prompts).float()
    assert relative_rms(ours(halves, *given, prompts), exact) < 2 * relative_rms(theirs, exact)


def test_a_prompt_is_swapped_without_the_conditioner():
    module, conditioner, trunk = make()
    latent, timestep, context, pooled = inputs(module)
    given = timestep, {"context": context, "pooled": pooled}
    first, second = random_prompts(module, [TEXT, 4])
    conditioning = conditioner.bake(trunk, *given, [first])
    del conditioner.text, conditioner.image, conditioner.single  # nothing of it is read again
    swapped, fresh = conditioning.with_prompts(trunk, [second]), make_again(module).bake(trunk, *given, [second])
    assert torch.equal(velocity(trunk, latent, swapped.batch()), velocity(trunk, latent, fresh.batch()))
    none, fresh = conditioning.with_prompts(trunk, []), make_again(module)(timestep, context, pooled)
    assert torch.equal(velocity(trunk, latent, none.batch()), velocity(trunk, latent, fresh.batch()))


def make_again(module):
    """A new conditioner with the module's weights."""
    return load_flux(FluxConfig.from_diffusers(dict(module.config)), module.state_dict())[0]


def test_conditioning_is_a_sequence_of_steps():
    module, conditioner, trunk = make()
    _, timestep, context, pooled = inputs(module)
    conditioning = conditioner.bake(trunk, timestep, {"context": context, "pooled": pooled}, random_prompts(module, [4]))
    assert len(conditioning) == len(list(conditioning)) == 2
    whole = conditioning.batch()
    for i, step in enumerate(conditioning):
        for name in ("double_modulation", "single_modulation", "head"):
            assert torch.equal(getattr(step, name), getattr(whole, name)[i : i + 1])
        assert torch.equal(step.single(2).modulation, whole.single_modulation[i : i + 1, 2])
        assert torch.equal(step.double(1).rows, whole.double_rows[1])
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"step {index} of 2"):
            conditioning[index]
    moved = conditioning.to("cpu", torch.bfloat16).batch()
    assert {name for name, tensor in moved._asdict().items() if tensor.dtype == torch.bfloat16} == {
        "text",
        "double_rows",
        "single_rows",
    }


def test_position_tables_are_computed_once_a_shape():
    trunk = make()[2]
    first = trunk.rotary((1, 3, 5), 9, torch.device("cpu"))
    assert trunk.rotary((1, 3, 5), 9, torch.device("cpu")) is first
    assert trunk.rotary((1, 5, 3), 9, torch.device("cpu")) is not first
    assert trunk.rotary((1, 3, 5), 8, torch.device("cpu")) is not first


@pytest.mark.parametrize(
    ("name", "conditioner_count", "trunk_count"),
    [("flux-dev", 3_292_296_192, 8_609_112_128), ("flux-schnell", 3_282_066_432, 8_609_112_128)],
)
def test_the_real_models_are_split_without_a_copy(name, conditioner_count, trunk_count):
    config = named_config(name)
    with torch.device("meta"):  # 12 billion parameters, none of them allocated
        model = FluxTransformer2DModel(**config.to_diffusers())
        conditioner, trunk = FluxConditioner(config), FluxTrunk(config)
    total, *split = (sum(p.numel() for p in part.parameters()) for part in (model, conditioner, trunk))
    assert split == [conditioner_count, trunk_count]
    assert sum(split) == total
    shapes = {key: tensor.shape for key, tensor in diffusers_state_dict(conditioner, trunk).items()}
    assert shapes == {key: tensor.shape for key, tensor in model.state_dict().items()}


class Recorder(dict):
    """A state dict that remembers what was read."""

    def __init__(self, state):
        super().__init__(state)
        self.seen = set()

    def __getitem__(self, name):
        self.seen.add(name)
        return super().__getitem__(name)


def test_no_modulation_parameter_is_in_the_trunk():
    module, _, trunk = make()
    by_trunk, by_conditioner = Recorder(module.state_dict()), Recorder(module.state_dict())
    assert {name for name, _ in trunk_parameters(trunk.config, by_trunk)} == trunk.state_dict().keys()
    list(conditioner_parameters(trunk.config, by_conditioner))
    embedders = ("time_text_embed.", "context_embedder.")
    modulations = (".norm.linear.", ".norm1.linear.", ".norm1_context.linear.", "norm_out.linear.")
    assert by_conditioner.seen == {
        name for name in by_trunk if name.startswith(embedders) or any(part in name for part in modulations)
    }
    assert by_trunk.seen == by_trunk.keys() - by_conditioner.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit_in_the_dtype_they_were_stored(dtype):
    module, *_ = make()
    state = {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
    halves = load_flux(FluxConfig.from_diffusers(dict(module.config)), state, dtype=dtype)
    back = diffusers_state_dict(*halves)
    assert back.keys() == state.keys()
    assert all(back[name].dtype == dtype and torch.equal(back[name], tensor) for name, tensor in state.items())


def test_a_checkpoint_with_other_keys_is_refused():
    module, *_ = make()
    config, state = FluxConfig.from_diffusers(dict(module.config)), module.state_dict()
    with pytest.raises(BackboneError, match=r"misses 1 key\(s\): x_embedder.bias"):
        load_flux(config, {name: tensor for name, tensor in state.items() if name != "x_embedder.bias"})
    with pytest.raises(BackboneError, match=r"has unexpected 1 key\(s\): lora_A"):
        load_flux(config, state | {"lora_A": torch.zeros(1)})


@pytest.mark.parametrize("change", ["a row more", "a dimension more"])
def test_every_wrong_shape_is_named(change):
    module, *_ = make({"num_layers": 1, "num_single_layers": 1})
    config, state = FluxConfig.from_diffusers(dict(module.config)), module.state_dict()
    for name, tensor in state.items():
        wrong = torch.cat((tensor, tensor[:1])) if change == "a row more" else tensor[None]
        with pytest.raises(BackboneError, match=re.escape(f"{name} has shape {tuple(wrong.shape)} in the checkpoint")):
            load_flux(config, state | {name: wrong})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 384, "out_channels": 64}, "in_channels=384 and out_channels=64"),
        ({"patch_size": 2}, "patch_size=2"),
        ({"in_channels": 62}, "in_channels=62"),
        ({"axes_dims_rope": (16, 56, 54)}, r"axes_dims_rope=\(16, 56, 54\)"),
        ({"axes_dims_rope": (15, 57, 56)}, r"axes_dims_rope=\(15, 57, 56\)"),
        ({"num_single_layers": 0}, "no single-stream"),
    ],
)
def test_a_configuration_of_another_model_is_refused(changes, message):
    with pytest.raises(BackboneError, match=message):
        FluxConfig.from_diffusers(named_config("flux-dev").to_diffusers() | changes)


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_a_configuration_survives_diffusers_names(name):
    config = named_config(name)
    assert (
        FluxConfig.from_diffusers(config.to_diffusers() | {"out_channels": None, "_class_name": "FluxTransformer2DModel"})
        == config
    )
    assert FluxConfig.from_diffusers({"guidance_embeds": config.guidance_embeds}) == config


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 1, 6, 9), r"latent size \(6, 9\) is not a multiple of 2"),
        ((1, 3, 1, 6, 8), r"expected a latent \[B, 4, F, H, W\], got \(1, 3, 1, 6, 8\)"),
        ((1, 4, 6, 8), r"expected a latent \[B, 4, F, H, W\]"),
    ],
)
def test_a_latent_that_does_not_fit_is_refused(shape, message):
    module, conditioner, trunk = make()
    step = conditioner(*inputs(module)[1:])[0]
    with pytest.raises(BackboneError, match=message):
        trunk(torch.randn(shape), step)


@pytest.mark.parametrize(
    ("residual", "blocks", "message"),
    [
        ((TEXT + 1, 32), 5, "a prompt of 10 rows does not fit on 9 text tokens"),
        ((4, 33), 5, r"a prompt of shape \(4, 33\) with 5 weights does not fit a backbone of width 32 with 5 blocks"),
        ((4, 32), 4, "with 4 weights"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(residual, blocks, message):
    module, conditioner, trunk = make()
    _, timestep, context, pooled = inputs(module)
    with pytest.raises(BackboneError, match=message):
        conditioner.bake(trunk, timestep, {"context": context, "pooled": pooled}, [(torch.randn(residual), torch.randn(blocks))])


def test_tokens_are_two_by_two_cells_in_the_released_order():
    trunk = FluxTrunk(FluxConfig.from_diffusers(TINY))
    latent = torch.randn(LATENT)
    tokens = trunk.pack(latent.unsqueeze(2), (1, 3, 5))
    # FLUX.1's rearrange "b c (h ph) (w pw) -> b (h w) (c ph pw)"
    expected = [latent[:, c, 2 + ph, 8 + pw] for c in range(4) for ph in range(2) for pw in range(2)]
    assert torch.equal(tokens[:, 1 * 5 + 4], torch.stack(expected, dim=1))
    assert torch.equal(tokens, packed(latent))
    assert torch.equal(trunk.unpack(tokens, (1, 3, 5)), latent.unsqueeze(2))
