"""An engine file of a bundled backbone holds its codec, and takes no VAE in its place."""

from pathlib import Path

import pytest
import torch

from ebr_engine.engine.restorer import Restorer
from ebr_engine.errors import EngineError
from ebr_engine.export.engine_file import load_engine
from tests.tiny import make_prompt, save_tiny


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    restorer = Restorer(model=save_tiny(folder / "tiny.safetensors"), device="cpu", precision="fp32")
    restorer.build(folder / "tiny.ebr", restorer.plan(prompt=make_prompt()))
    return restorer, folder / "tiny.ebr"


def test_the_codec_comes_back_as_it_was(engine):
    restorer, path = engine
    file = load_engine(path, torch.device("cpu"))
    for name, tensor in restorer.codec.to_tensors().items():
        assert torch.equal(getattr(file.backbone.codec, name), tensor)
    assert file.backbone.spec is restorer.backbone.spec


def test_a_vae_is_refused_even_one_that_is_not_there(engine, one_line):
    with pytest.raises(EngineError, match="holds the codec of mini, which takes no VAE; leave nowhere out") as error:
        load_engine(engine[1], torch.device("cpu"), Path("nowhere"))
    one_line(error, [])
