"""`ebr-engine cache-text`: from a model folder to the small file that takes the text encoder's place."""

import json
import re

import pytest
import torch

from ebr_engine.backbones import checkpoint, text
from tests.real_layout import write_tokenizer

transformers = pytest.importorskip("transformers")

TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 1,
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.fixture
def model(tmp_path):
    """A Wan model in diffusers' layout, without the transformer's weights, which are of no use here."""
    folder = tmp_path / "tiny-wan"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(TRANSFORMER))
    sizes = {"vocab_size": 9, "d_model": 20, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def runs(monkeypatch):
    """How often the encoders run."""
    counted, encode = [], text.encode_empty
    monkeypatch.setattr(text, "encode_empty", lambda *args, **kwargs: counted.append(args) or encode(*args, **kwargs))
    return counted


def expected(model):
    return text.encode_empty("wan", [model / "text_encoder"], [model / "tokenizer"], device="cpu")["context"]


def refused(result, *words):
    code, stdout, stderr = result
    assert (code, stdout) == (2, "")
    line = stderr.splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_the_cache_is_filled_once(cli, model, cache, runs):
    code, stdout, stderr = cli("cache-text", "--backbone", "wan", "--model", model)
    assert code == 0
    assert stderr.startswith("encoding the empty text of tiny-wan@")
    (file,) = cache.iterdir()
    told = re.fullmatch(r"(\S+)  (tiny-wan@\w+): context \[226, 20\]; 0\.0 MB, \d+\.\d s\n", stdout)
    assert told[1] == str(file)
    assert torch.equal(text.cached_context("wan", told[2])["context"], expected(model))
    assert len(runs) == 2  # the test's own is the second
    code, stdout, stderr = cli("cache-text", "--backbone", "wan", "--model", model)
    assert (code, stderr) == (0, "")
    assert f"{file} holds" in stdout
    assert len(runs) == 2
    assert cli("cache-text", "--backbone", "wan", "--model", model, "--overwrite")[0] == 0
    assert len(runs) == 3


def test_a_file_of_ones_own_is_written_and_the_cache_left_alone(cli, model, cache, tmp_path):
    code, stdout, _ = cli("cache-text", "-b", "wan", "--model", model, "-o", "new/text.safetensors")
    assert code == 0
    assert stdout.startswith("new/text.safetensors  tiny-wan@")
    assert torch.equal(text.load_context(tmp_path / "new" / "text.safetensors", "wan")["context"], expected(model))
    assert not cache.exists()


def test_a_file_of_ones_own_is_taken_from_the_cache(cli, model, tmp_path, runs):
    assert cli("cache-text", "-b", "wan", "--model", model)[0] == 0
    assert cli("cache-text", "-b", "wan", "--model", model, "-o", "text.safetensors")[0] == 0
    assert len(runs) == 1
    assert torch.equal(text.load_context(tmp_path / "text.safetensors", "wan")["context"], expected(model))


def test_an_existing_file_is_replaced_on_request_only(cli, model, tmp_path, runs):
    file = tmp_path / "text.safetensors"
    file.write_bytes(b"precious")
    arguments = ("cache-text", "-b", "wan", "--model", model, "-o", file)
    refused(cli(*arguments), str(file), "exists", "--overwrite")
    assert (file.read_bytes(), runs) == (b"precious", [])
    assert cli(*arguments, "--overwrite")[0] == 0
    assert text.load_context(file, "wan")


def test_the_hub_is_asked_for_the_text_parts_of_the_pinned_revision(cli, model, monkeypatch):
    asked, find_model = [], checkpoint.find_model

    def find(backbone, source, **how):
        asked.append((backbone, source, how))
        return find_model(backbone, model, parts=how["parts"])

    monkeypatch.setattr(checkpoint, "find_model", find)
    assert cli("cache-text", "-b", "wan", "--model", "org/name", "--revision", "v1", "--offline")[0] == 0
    pinned = {"revision": "v1", "offline": True}
    parts = [(), ("text_encoder", "tokenizer")]  # what is cached is known without fetching an encoder
    assert asked == [("wan", "org/name", {**pinned, "parts": part}) for part in parts]


def test_what_is_missing_is_told_in_one_line(cli, model, cache, tmp_path):
    arguments = ("cache-text", "--backbone", "wan", "--model", model)
    (model / "text_encoder" / "model.safetensors").unlink()
    refused(cli(*arguments), str(model / "text_encoder"), ".safetensors", "--context FILE")
    for folder in ("tokenizer", "text_encoder"):
        (model / folder).rename(tmp_path / f"no {folder}")
    refused(cli(*arguments), "no text_encoder folder", "--context FILE")
    refused(cli("cache-text", "--backbone", "mini"), "mini", "wan, flux")
    refused(cli("cache-text", "--backbone", "wan", "--model", "nowhere.safetensors"), "nowhere.safetensors")
    refused(cli("cache-text", "--model", model), "--backbone")
    assert not cache.exists()
