"""The VAE of FLUX.1, and of FLUX.2 but for its normalisation, with diffusers' names of weights: pictures, one by one."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ebr_engine.backbones.vae_layers import Attention, Convolution, GroupNorm, Halving, Pointwise, linear


@dataclass(frozen=True)
class FluxVaeConfig:
    """Sizes as config.json has them; the defaults are those of diffusers' AutoencoderKL."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: Sequence[str] = ("DownEncoderBlock2D",)
    up_block_types: Sequence[str] = ("UpDecoderBlock2D",)
    block_out_channels: Sequence[int] = (64,)
    decoder_block_out_channels: Sequence[int] | None = None
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class FluxVae(nn.Module):
    """The whole network; its halves are called one by one."""

    def __init__(self, config: FluxVaeConfig):
        super().__init__()
        self.config, both = config, 2 * config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = Pointwise(both, both, 2) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = Pointwise(both // 2, both // 2, 2) if config.use_post_quant_conv else nn.Identity()


class Encoder(nn.Module):
    """Pixels → moments."""

    def __init__(self, config: FluxVaeConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Convolution(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for i, (channels, outputs) in enumerate(itertools.pairwise((widths[0], *widths))):
            halving = Halving(outputs) if i < len(widths) - 1 else None
            self.down_blocks.append(Stage(channels, outputs, config.layers_per_block, groups, "downsamplers", halving))
        self.mid_block = Middle(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = Convolution(widths[-1], 2 * config.latent_channels)

    def fine(self, x: Tensor) -> Tensor:
        """[T, channels, H, W] → features [T, C, h, w]."""
        return chained(x, [self.conv_in, *(part for block in self.down_blocks for part in block.parts())])

    def coarse(self, x: Tensor) -> Tensor:
        """Features → moments [T, 2·latent_channels, h, w], before `quant_conv`."""
        return self.conv_out(self.conv_norm_out(self.mid_block(x), overwrite=True))


class Decoder(nn.Module):
    """Latent → pixels."""

    def __init__(self, config: FluxVaeConfig):
        super().__init__()
        widths = list(reversed(config.decoder_block_out_channels or config.block_out_channels))
        groups = config.norm_num_groups
        self.conv_in = Convolution(config.latent_channels, widths[0])
        self.mid_block = Middle(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for i, (channels, outputs) in enumerate(itertools.pairwise((widths[0], *widths))):
            doubling = Convolution(outputs, outputs, doubled=True) if i < len(widths) - 1 else None
            self.up_blocks.append(Stage(channels, outputs, config.layers_per_block + 1, groups, "upsamplers", doubling))
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = Convolution(widths[-1], config.out_channels)

    def coarse(self, z: Tensor) -> Tensor:
        """Latent [T, latent_channels, h, w], after `post_quant_conv` → features [T, C, h, w]."""
        return self.mid_block(self.conv_in(z))

    def fine(self, x: Tensor) -> Tensor:
        """Features → pixels [T, channels, H, W]."""
        parts = [part for block in self.up_blocks for part in block.parts()]
        return chained(x, [*parts, lambda x: self.conv_out(self.conv_norm_out(x, overwrite=True))])


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, outputs: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, channels), Convolution(channels, outputs)
        self.norm2, self.conv2 = GroupNorm(groups, outputs), Convolution(outputs, outputs)
        self.conv_shortcut = Pointwise(channels, outputs, 2) if channels != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[T, channels, H, W] → [T, outputs, H, W]."""
        beside = self.conv_shortcut(x)
        y = self.conv1(self.norm1(x, overwrite=beside is not x))
        return self.conv2(self.norm2(y, overwrite=True), added=beside, over_added=beside is not x)


class Stage(nn.Module):
    """Blocks of one width, and what changes the size behind them, under the name that diffusers has for it."""

    def __init__(self, channels: int, outputs: int, count: int, groups: int, name: str, sampler: nn.Module | None):
        super().__init__()
        inner = [channels] + [outputs] * count
        self.resnets = nn.ModuleList(Residual(*pair, groups) for pair in itertools.pairwise(inner))
        self.sampler = name if sampler is not None else None
        if sampler is not None:
            setattr(self, name, nn.ModuleList([nn.ModuleDict({"conv": sampler})]))

    def parts(self) -> list[nn.Module]:
        """What pictures go through, one after the other."""
        return [*self.resnets, *([] if self.sampler is None else [getattr(self, self.sampler)[0]["conv"]])]


class PictureAttention(Attention):
    """Attention within a picture, added to it."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, silu=False)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, H, W] → the same."""
        normed = self.group_norm(x)
        q, k, v = (linear([normed], [layer.weight], layer.bias) for layer in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0]
        return x + linear([self.attend(x, q, k, v)], [out.weight], out.bias)


def chained(x: Tensor, parts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """One part after the other; what one is given is not kept for longer than that."""
    for part in parts:
        x = part(x)
    return x


class Middle(nn.Module):
    """Where every position of a picture sees all others."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([Residual(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([PictureAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, H, W] → the same."""
        for block in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = block(x)
        return x
