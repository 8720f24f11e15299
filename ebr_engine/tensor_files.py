"""Writing safetensors files so that a reader never sees half of one."""

import secrets
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata beside `path` and move them there; folders are made. Raises OSError or SafetensorError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(6)}.partial")  # several threads or processes may write the same file
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, dict(metadata))
        partial.chmod(mode)  # the library makes files for their owner alone
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
