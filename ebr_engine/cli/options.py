"""The options of `restore` and their help, grouped as its help page shows them."""

from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer


class Schedule(str, Enum):
    fast = "fast"
    released = "released"
    exact = "exact"
    uniform = "uniform"


class Precision(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"
    fp8 = "fp8"


class CompareAs(str, Enum):
    side = "side"
    wipe = "wipe"


class ColorFix(str, Enum):
    none = "none"
    wavelet = "wavelet"
    adain = "adain"


class Mix(str, Enum):
    auto = "auto"
    residual = "residual"
    velocity = "velocity"
    turn = "turn"


_repair = partial(typer.Option, rich_help_panel="What to repair")
_file = partial(typer.Option, rich_help_panel="Files")
_sampling = partial(typer.Option, rich_help_panel="Sampling")
_model = partial(typer.Option, rich_help_panel="Model")
_computing = partial(typer.Option, rich_help_panel="Computing")

_clip = partial(typer.Option, rich_help_panel="Clips")

Inputs = Annotated[
    list[str] | None,
    typer.Argument(metavar="INPUT", help="Pictures and clips, folders of them, or patterns in quotes such as 'photos/**/*.jpg'."),
]

Task = Annotated[
    str | None,
    _repair(
        "--task",
        "-t",
        metavar="NAME",
        help="A bundled or installed prompt, such as haze; several: rain:0.7+haze:0.3; auto looks at each file.",
    ),
]
Prompts = Annotated[
    list[str] | None,
    _repair("--prompt", "-p", metavar="FILE[:WEIGHT]...", help="Prompt files in place of a task; weight 1 if none is given."),
]
PromptMix = Annotated[
    Mix,
    _repair(
        "--mix",
        help="Several prompts: add their residuals (one run), average velocities, or restore in turn; auto: turn for mini.",
    ),
]
Guess = Annotated[bool, _repair("--guess", help="With --task auto: take the likeliest task where none is sure.")]
ColourFix = Annotated[
    ColorFix | None,
    _repair("--color-fix", show_default="by task", help="Give results the input's colours; never right for haze or low light."),
]
Strength = Annotated[
    float,
    _repair("--strength", metavar="X", min=0, max=2, help="Of the prompts: 1 as learned, 0 none, at most 2."),
]

Out = Annotated[
    str | None, _file("--out", "-o", metavar="OUT", help="A file for one input, or a folder (made if missing) that mirrors them.")
]
Manifest = Annotated[
    Path | None,
    _file("--manifest", metavar="FILE", help="A list of work, .csv or .jsonl: input, output, task; relative to its folder."),
]
Resume = Annotated[
    bool, _file("--resume/--no-resume", help="Leave out what an earlier run with the same settings finished; go on within clips.")
]
FailFast = Annotated[bool, _file("--fail-fast", help="End at the first file that fails.")]
Json = Annotated[bool, _file("--json", help="Print a JSON object a file, and one for the whole, in place of lines.")]
Compare = Annotated[bool, _file("--compare", help="Also write NAME_compare: input beside output, of pictures and of clips.")]
CompareWay = Annotated[
    CompareAs | None,
    _file("--compare-as", show_default="side", help="How: side by side, or with a line that wipes from one to the other."),
]
Preview = Annotated[
    bool,
    _file("--preview", help="First write NAME_preview.png, a frame or the centre of the first file, and ask whether to go on."),
]
Yes = Annotated[bool, _file("--yes", "-y", help="Go on after the preview without asking; without a terminal it ends there.")]
Overwrite = Annotated[bool, _file("--overwrite", help="Replace outputs that exist; never an input.")]
Quality = Annotated[
    int | None,
    _file(
        "--quality",
        metavar="N",
        min=1,
        max=100,
        show_default="a JPEG's own; lossless if the input is; else 95",
        help="Of JPEG, WebP and AVIF outputs.",
    ),
]
Strict = Annotated[bool, _file("--strict", help="A file fails where its output does not keep all that it holds.")]
Quiet = Annotated[bool, _file("--quiet", "-q", help="Print errors only.")]

Steps = Annotated[
    int | None,
    _sampling("--steps", metavar="N", min=1, show_default="by schedule", help="Runs of the transformer per picture."),
]
StepSchedule = Annotated[
    Schedule, _sampling("--schedule", help="How the steps are spread; released is what the paper's code does.")
]
Order = Annotated[
    int | None, _sampling("--order", metavar="N", min=1, max=2, show_default="by schedule", help="Order of the solver.")
]
T0 = Annotated[
    float | None,
    _sampling("--t0", metavar="X", show_default="the prompt's", help="Noise at the start, between 0 and 1: more changes more."),
]
Seed = Annotated[int, _sampling("--seed", metavar="N", min=0, help="Seed of the noise.")]


class Offload(str, Enum):
    none = "none"
    codec = "codec"
    blocks = "blocks"


class Blend(str, Enum):
    latent = "latent"
    pixel = "pixel"


class Size(str, Enum):
    native = "native"
    released = "released"


Backbone = Annotated[str, _model("--backbone", "-b", metavar="NAME", help="The frozen transformer: mini, wan or flux.")]
Model = Annotated[
    str | None,
    _model(
        "--model",
        "-m",
        metavar="SOURCE",
        show_default="the backbone's own",
        help="Its weights: a folder, a .safetensors file, or a hub id such as Wan-AI/Wan2.1-T2V-14B-Diffusers.",
    ),
]
Revision = Annotated[str | None, _model("--revision", metavar="NAME", help="Branch, tag or commit of a hub id.")]
Offline = Annotated[bool, _model("--offline", help="Never ask the hub; use what has been downloaded.")]
Context = Annotated[
    Path | None, _model("--context", metavar="FILE", help="The empty text, from ebr-engine cache-text; spares the text encoders.")
]
Vae = Annotated[Path | None, _model("--vae", metavar="FOLDER", help="Another VAE, in diffusers' layout.")]
SampleLatents = Annotated[
    bool, _model("--sample-latents", help="Draw latents from the VAE's posterior, as released, rather than take its mode.")
]
Engine = Annotated[
    Path | None, _model("--engine", metavar="FILE", help="A file from ebr-engine build or export, in place of all of the above.")
]
Device = Annotated[str, _computing("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
OffloadMode = Annotated[
    Offload, _computing("--offload", help="What waits in main memory while a small GPU does not need it; blocks is the most.")
]


class CompileMode(str, Enum):
    auto = "auto"
    off = "off"
    on = "on"


Compile = Annotated[
    CompileMode,
    _computing(
        "--compile",
        help="Compile the transformer for every size of picture; auto does for many pictures, and uses CUDA graphs on a GPU.",
    ),
]
PictureSize = Annotated[
    Size,
    _sampling("--size", help="released: the published protocol's fixed size, 480x832 (wan) or 1024x1024 (flux)."),
]
TrunkPrecision = Annotated[Precision, _computing("--precision", help="Of the transformer; auto goes by the device.")]
Fp8 = Annotated[bool, _computing("--fp8", help="Short for --precision fp8.")]
Tile = Annotated[
    int | None,
    _computing(
        "--tile",
        min=0,
        metavar="PIXELS",
        show_default="by backbone",
        help="Side of a tile; smaller needs less memory; 0 never tiles.",
    ),
]
TileOverlap = Annotated[
    int | None,
    _computing("--tile-overlap", min=0, metavar="PIXELS", show_default="by backbone", help="What neighbouring tiles share."),
]

TileBlend = Annotated[
    Blend,
    _computing("--tile-blend", help="latent: tiles agree in every step; pixel: each runs alone, with less memory."),
]
MaxMemory = Annotated[
    str | None,
    _computing(
        "--max-memory",
        metavar="SIZE",
        show_default="all there is",
        help="Such as 8G: choose tiles, chunks and what waits in main memory so that this is enough.",
    ),
]
LowMemory = Annotated[bool, _computing("--low-memory", help="All that saves memory without smaller tiles or chunks; slower.")]

Start = Annotated[float | None, _clip("--start", metavar="SECONDS", min=0, help="Begin there.")]
Frames = Annotated[int | None, _clip("--frames", metavar="N", min=1, help="Restore so many frames only.")]
ChunkFrames = Annotated[
    int | None,
    _clip("--chunk-frames", metavar="N", min=1, show_default="by backbone", help="Frames that are restored together."),
]
ChunkOverlap = Annotated[
    int | None,
    _clip("--chunk-overlap", metavar="N", min=0, show_default="by backbone", help="Frames over which they fade into each other."),
]
AsClip = Annotated[bool, _clip("--as-clip", help="The folder's pictures are the frames of one clip.")]
FrameRate = Annotated[float, _clip("--fps", metavar="X", min=0.01, help="Of a folder of frames without a timestamps.txt.")]
PerFrame = Annotated[bool, _clip("--per-frame", help="Restore a clip frame by frame with flux, which knows no time.")]
Deinterlace = Annotated[bool, _clip("--deinterlace", help="Make whole frames of an interlaced clip.")]
VideoCodec = Annotated[
    str | None,
    _clip(
        "--codec",
        "-c",
        metavar="NAME",
        show_default="an editor's or archive's own; else H.264, HEVC above 8 bit",
        help="FFmpeg's encoder.",
    ),
]
PixelFormat = Annotated[str | None, _clip("--pix-fmt", metavar="NAME", show_default="by codec and source", help="Stored format.")]
Crf = Annotated[float | None, _clip("--crf", metavar="X", min=0, show_default="by codec", help="Quality; lower is better.")]
EncoderOptions = Annotated[list[str] | None, _clip("-e", metavar="KEY=VALUE...", help="More options of the encoder.")]
CopyAudio = Annotated[bool, _clip("--copy-audio/--no-copy-audio", help="Keep the sound, untouched.")]
CopySubtitles = Annotated[bool, _clip("--copy-subtitles/--no-copy-subtitles", help="Keep the subtitles, untouched.")]
