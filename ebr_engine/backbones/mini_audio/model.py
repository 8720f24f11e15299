"""`mini-audio`: Wan's architecture over the MDCT of sound, with `mini`'s text encoder; ships in the package."""

from functools import partial
from pathlib import Path

from ebr_engine.backbones.mini.model import load_mini, save_mini
from ebr_engine.backbones.mini_audio.codec import SoundCodec
from ebr_engine.backbones.wan.model import WanConfig

WEIGHTS = Path(__file__).parents[2] / "assets" / "mini-audio" / "mini-audio.safetensors"
FORMAT = "ebr-engine mini-audio 1"
MINI_AUDIO = WanConfig(
    patch_size=(1, 1, 1),
    num_attention_heads=3,
    attention_head_dim=64,
    in_channels=SoundCodec.channels,
    out_channels=SoundCodec.channels,
    text_dim=64,
    freq_dim=128,
    ffn_dim=512,
    num_layers=5,
    rope_max_seq_len=4096,
)
CODECS = {SoundCodec.channels: SoundCodec}
load_mini_audio = partial(load_mini, formats=(FORMAT,), codecs=CODECS)
save_mini_audio = partial(save_mini, format=FORMAT)
