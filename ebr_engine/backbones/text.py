"""The empty text: what a backbone's text encoders make of "", computed once and kept as a small file.

The text never changes, so neither does its context: UMT5-XXL (11 GB), T5-XXL with CLIP (10 GB) or a language model (8 GB and
more) run for one text and are never loaded again. Source: `WanPipeline` and `FluxPipeline` of diffusers, as the released code
calls them; `Flux2KleinPipeline` and `Flux2Pipeline`.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ebr_engine.backbones.base import Encoder
from ebr_engine.backbones.registry import published, spec
from ebr_engine.errors import BackboneError, EbrError
from ebr_engine.settings import cache_dir
from ebr_engine.tensor_files import write_tensors

FORMAT = "ebr-engine context 1"
LARGE = 4 * 2**30  # bytes of weights; beyond, an encoder is held as bf16 whatever its files hold (Wan's hold 23 GB of float32)
ROOM = 2 * 2**30  # bytes on the GPU beside the weights: one block in float32, activations
FAST_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
TOKENIZER_FILES = (*FAST_TOKENIZER_FILES, "spiece.model")  # without one, transformers makes up an empty vocabulary
INSTALL = "pip install 'ebr-engine[models]'"

logger = logging.getLogger("ebr_engine")


def empty_context(
    backbone: str,
    identity: str,
    text_encoders: Sequence[Path],
    tokenizers: Sequence[Path],
    *,
    device: str | torch.device = "auto",
) -> dict[str, Tensor]:
    """The empty text's context of a model: from the cache, or computed by `encode_empty` and cached.

    `identity` names the model's files for good (`org/name@revision`, or a folder and its hash).
    """
    context = cached_context(backbone, identity)
    if context is None:
        context = encode_empty(backbone, text_encoders, tokenizers, device=device)
        try:
            save_context(context_file(backbone, identity), backbone, identity, context)
        except BackboneError as error:  # a read-only home is no reason to stop
            logger.warning("the empty text's context is not kept: %s", error)
    return context


def cached_context(backbone: str, identity: str) -> dict[str, Tensor] | None:
    """The context that the cache holds for a model; None if there is none, or (with a warning) if its file is damaged."""
    path = context_file(backbone, identity)
    if not path.exists():
        return None
    try:
        return load_context(path, backbone)
    except BackboneError as error:
        logger.warning("ignored a damaged file of the cache: %s", error)
        return None


def context_file(backbone: str, identity: str) -> Path:
    """Where the cache keeps the context of a model: a readable name, and a hash so that no two models share it."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", identity).strip("-.")[-80:]
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return cache_dir() / "text" / f"{backbone}-{readable}-{digest}.safetensors"


def save_context(path: Path | str, backbone: str, identity: str, tensors: dict[str, Tensor]) -> None:
    """Write a context as safetensors, float32, atomically; `BackboneError` if it cannot be written or is no context."""
    path = Path(path)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    _check(tensors, backbone, "the context to save")
    try:
        write_tensors(path, tensors, {"format": FORMAT, "backbone": backbone, "identity": identity})
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"cannot write {path}: {error}") from error


def load_context(path: Path | str, backbone: str) -> dict[str, Tensor]:
    """Read a context: float32, `context` [226, text_dim] for Wan, [512, joint_dim] for FLUX, and `pooled` [D] for FLUX.1.

    Raises `BackboneError` for a file that is missing, damaged, of another format or backbone, or holds non-finite numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise BackboneError(f"no such context file: {path}")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{path} is not a context file: {error}") from error
    if about.get("format") != FORMAT:
        raise BackboneError(f"{path} is not a context file: its format is {about.get('format')!r}, expected {FORMAT!r}")
    if about.get("backbone") != backbone:
        raise BackboneError(f"{path} is the context of the {about.get('backbone')} backbone, not of {backbone}")
    _check(tensors, backbone, str(path))
    return tensors


def encode_empty(
    backbone: str, text_encoders: Sequence[Path], tokenizers: Sequence[Path], *, device: str | torch.device = "auto"
) -> dict[str, Tensor]:
    """Run the text encoders on the empty text; float32 on the CPU, shapes as `load_context` gives.

    Args: folders in the model's order (text_encoder, text_encoder_2). `device`: `auto` is the GPU if the encoder fits, else
    the CPU. Weights of more than 4 GiB are held as bf16; the arithmetic is float32 on any device.
    Raises: `BackboneError` naming the folder or file that is missing, damaged or of another kind; `EbrError` without
    transformers.
    """
    encoders = _encoders(backbone)
    _check_folders(backbone, text_encoders, tokenizers)
    with _quiet(_transformers()):
        tensors = {
            encoder.tensor: _encode(encoder, Path(weights), Path(words), device)
            for encoder, weights, words in zip(encoders, text_encoders, tokenizers)
        }
    _check(tensors, backbone, "the text encoders' output")
    return tensors


def _encoders(backbone: str) -> tuple[Encoder, ...]:
    if spec(backbone).bundled:
        names = ", ".join(one.name for one in published())
        raise BackboneError(f"the {backbone} backbone has no text encoder to run; those that have: {names}")
    return spec(backbone).checkpoints.text_encoders


def _check(tensors: dict[str, Tensor], backbone: str, where: str) -> None:
    expected = {encoder.tensor: encoder for encoder in _encoders(backbone)}
    for name, encoder in expected.items():
        if name not in tensors:
            raise BackboneError(f"{where} lacks the tensor {name!r}")
        shape = tensors[name].shape
        if len(shape) != (1 if encoder.pooled else 2) or not shape[-1] or (shape[0] != encoder.tokens and not encoder.pooled):
            raise BackboneError(f"{where}: {name} has shape {list(shape)}, expected {encoder.shape}")
        if not tensors[name].isfinite().all():
            raise BackboneError(f"{where}: {name} holds values that are not finite")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise BackboneError(f"{where} holds unknown tensors: {', '.join(unknown[:3])}")


def _check_folders(backbone: str, text_encoders: Sequence[Path], tokenizers: Sequence[Path]) -> None:
    """Tell what the model lacks before anything is loaded."""
    if lack := next(_lacks(len(_encoders(backbone)), text_encoders, tokenizers), None):
        raise BackboneError(
            f"{lack}, so the empty text cannot be encoded; give a context file with --context FILE "
            f"(made from the whole model by: ebr-engine cache-text --backbone {backbone} --model MODEL -o FILE)"
        )


def _lacks(count: int, text_encoders: Sequence[Path], tokenizers: Sequence[Path]) -> Iterator[str]:
    for index in range(count):
        suffix = f"_{index + 1}" if index else ""
        for name, folders in ((f"text_encoder{suffix}", text_encoders), (f"tokenizer{suffix}", tokenizers)):
            if index >= len(folders):
                yield f"the model has no {name} folder"
            elif not (folder := Path(folders[index])).is_dir():
                yield f"there is no {name} folder {folder}"
            elif folders is tokenizers and not any((folder / file).is_file() for file in TOKENIZER_FILES):
                yield f"there is none of {', '.join(TOKENIZER_FILES)} in {folder}"
            elif folders is text_encoders and not (folder / "config.json").is_file():
                yield f"there is no config.json in {folder}"
            elif folders is text_encoders and not any(folder.glob("*.safetensors")):
                yield f"there are no .safetensors files in {folder}"


def _encode(encoder: Encoder, weights: Path, words: Path, device: str | torch.device) -> Tensor:
    encoder = _found(encoder, weights)
    ids, mask = _tokenize(encoder, words)
    model = _load(encoder, weights)
    if encoder.layers:
        model = _first_layers(model, max(encoder.layers))
    if ids.max() >= model.config.vocab_size:
        raise BackboneError(f"the tokenizer in {words} has more words than the text encoder in {weights}")
    device = _choose_device(model) if device == "auto" else torch.device(device)
    model, ids, mask = model.to(device), ids.to(device), mask.to(device)
    with torch.no_grad():
        if encoder.pooled:
            return model.float()(ids).pooler_output[0].cpu()
        embedded = model.get_input_embeddings()(ids).float()
        if encoder.layers:
            return _layers_side_by_side(encoder.layers, model, embedded, mask).cpu()
        _compute_in_float32(model.encoder.block, model.encoder.final_layer_norm)
        rows = model(inputs_embeds=embedded, attention_mask=mask if encoder.masked else None).last_hidden_state[0]
    return (rows.masked_fill(mask[0, :, None] == 0, 0) if encoder.masked else rows).cpu()


def _found(encoder: Encoder, folder: Path) -> Encoder:
    """The encoder, or what the folder holds in its place."""
    if encoder.instead is None or _kind(folder) in encoder.kinds:
        return encoder
    return encoder.instead if _kind(folder) in encoder.instead.kinds else encoder


def _first_layers(model: nn.Module, count: int) -> nn.Module:
    """A language model without the layers after the first `count`, of which nothing is read, and without its head."""
    decoder = model.get_decoder()
    if len(decoder.layers) < count:
        raise BackboneError(f"the text encoder has {len(decoder.layers)} layers, {count} or more are expected")
    decoder.layers = decoder.layers[:count]
    return decoder


def _layers_side_by_side(layers: Sequence[int], decoder: nn.Module, embedded: Tensor, mask: Tensor) -> Tensor:
    """What these layers (counted from 1) make of tokens [1, T, D], side by side: [T, D·layers] float32."""
    kept: dict[int, Tensor] = {}
    _compute_in_float32(decoder.layers, decoder.norm)
    for number in layers:
        decoder.layers[number - 1].register_forward_hook(lambda *given, number=number: kept.update({number: given[-1][0]}))
    decoder(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    return torch.cat([kept[number] for number in layers], dim=-1)


def _tokenize(encoder: Encoder, folder: Path) -> tuple[Tensor, Tensor]:
    """Token ids and mask of the empty text, [1, tokens] int64 each."""
    if not any((folder / file).is_file() for file in FAST_TOKENIZER_FILES) and find_spec("sentencepiece") is None:
        raise EbrError(f"reading the tokenizer in {folder} needs sentencepiece: {INSTALL}")
    with _reading("the tokenizer", folder):
        tokenizer = getattr(_transformers(), encoder.tokenizer).from_pretrained(folder, local_files_only=True)
        how = {"padding": "max_length", "max_length": encoder.tokens, "truncation": True, "return_tensors": "pt"}
        empty = ""
        if encoder.chat:  # which writes its own special tokens
            empty = tokenizer.apply_chat_template(list(map(dict, encoder.chat)), tokenize=False, **encoder.template)
            how["add_special_tokens"] = False
        tokens = tokenizer([empty], **how)
        ids, mask = tokens.input_ids, tokens.attention_mask
    if ids.shape != (1, encoder.tokens) or encoder.special not in (None, mask.sum()):
        found = f"{int(mask.sum())} of {ids.shape[-1]} tokens"
        expected = f"{encoder.special} of {encoder.tokens}"
        raise BackboneError(f"the tokenizer in {folder} makes {found} of the empty text, expected {expected}")
    return ids, mask


def _load(encoder: Encoder, folder: Path) -> nn.Module:
    """The encoder as stored, but bf16 if it is large; `BackboneError` unless its files hold every weight it has."""
    transformers = _transformers()
    large = sum(file.stat().st_size for file in folder.glob("*.safetensors")) > LARGE
    if (kind := _kind(folder)) not in encoder.kinds:
        raise BackboneError(f"the text encoder in {folder} is of kind {kind!r}, expected {encoder.kinds[0]}")
    with _reading("the text encoder", folder):
        model, report = getattr(transformers, encoder.model).from_pretrained(
            folder,
            dtype=torch.bfloat16 if large else "auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise BackboneError(f"the text encoder in {folder} lacks {len(missing)} weights: {', '.join(missing[:3])}")
    return model.requires_grad_(False)


def _kind(folder: Path) -> str | None:
    """What a text encoder's configuration says that it is."""
    with _reading("the text encoder", folder):
        return _transformers().PretrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")


def _choose_device(model: nn.Module) -> torch.device:
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    fits = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > size + ROOM
    return torch.device("cuda" if fits else "cpu")


def _compute_in_float32(blocks: nn.ModuleList, last: nn.Module) -> None:
    """Widen each block of an encoder while it runs, and only then: exact, so the way back loses nothing. `last` stays wide.

    A CPU without bf16 instructions would need hours for 512 tokens in bf16; all weights in float32 take twice the memory.
    """
    dtype = next(blocks[0].parameters()).dtype

    def widen(block: nn.Module, _: Any) -> None:
        block.float()

    def narrow(block: nn.Module, *_: Any) -> None:
        block.to(dtype)

    for block in blocks:
        block.register_forward_pre_hook(widen)
        block.register_forward_hook(narrow)
    last.float()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EbrError(f"reading a text encoder needs transformers ({error}): {INSTALL}") from error
    return transformers


@contextmanager
def _reading(what: str, folder: Path) -> Iterator[None]:
    """Tell a file that transformers cannot read as what it is."""
    try:
        yield
    except EbrError:
        raise
    except Exception as error:  # a damaged folder raises almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BackboneError(f"cannot read {what} in {folder}: {reason[:300]}") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars and load reports: what matters of them is an error here."""
    logging_ = transformers.utils.logging
    verbosity, bars = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity_error()
    logging_.disable_progress_bar()
    try:
        yield
    finally:
        logging_.set_verbosity(verbosity)
        if bars:
            logging_.enable_progress_bar()
