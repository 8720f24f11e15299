"""A process with a pretended device, and a tiny backbone whose widths are multiples of 16, as fp8 products need them."""

import pytest

from tests.device_lane.pretended import pretended
from tests.tiny import make_prompt, save_tiny

WIDE = {"attention_head_dim": 16, "ffn_dim": 64}


@pytest.fixture
def device(monkeypatch):
    with pretended(monkeypatch) as device:
        yield device


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """The file of the backbone."""
    return save_tiny(tmp_path_factory.mktemp("wide") / "wide.safetensors", **WIDE)


@pytest.fixture(scope="session")
def wide_prompt():
    return make_prompt(width=32)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The folders of a tiny Wan, FLUX.1 and FLUX.2 as diffusers writes them, a prompt in each; made before there is a device."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from tests import real_layout

    root = tmp_path_factory.mktemp("published")
    for name, rows, width, blocks in (("wan", 226, 24, 2), ("flux", 40, 24, 3), ("flux2", 40, 32, 3)):
        getattr(real_layout, f"write_{name}")(root / name)
        real_layout.write_released_prompt(root / name / "rain.pt", name, rows, width, blocks)
    return root.joinpath
