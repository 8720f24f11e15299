"""The empty text's context: equal to what diffusers' pipelines compute, kept once a model, and clear about what is wrong."""

import json
import logging
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ebr_engine.backbones import text
from ebr_engine.errors import BackboneError, EbrError
from tests.real_layout import write_tokenizer

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

WORDS = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}


def t5_sizes(layers):
    return {"vocab_size": 23, "d_model": 20, "d_kv": 4, "d_ff": 12, "num_layers": layers, "num_heads": 3}


def write_t5(model, config, folder, dtype):
    """A T5 with weights large enough that every token of the empty text comes out different."""
    made = model(config).to(dtype)
    for weight in made.parameters():
        weight.data += 0.5 * torch.randn_like(weight)
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Text parts in the layout of the published models: {(backbone, dtype): (text encoders, tokenizers)}."""
    torch.manual_seed(1)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        wan, flux = tmp_path_factory.mktemp("wan"), tmp_path_factory.mktemp("flux")
        write_t5(transformers.UMT5EncoderModel, transformers.UMT5Config(**t5_sizes(3)), wan / "text_encoder", dtype)
        write_tokenizer(wan / "tokenizer")
        write_t5(transformers.T5EncoderModel, transformers.T5Config(**t5_sizes(2)), flux / "text_encoder_2", dtype)
        write_tokenizer(flux / "tokenizer_2")
        sizes = {"vocab_size": 3, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
        clip = transformers.CLIPTextConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1)
        transformers.CLIPTextModel(clip).to(dtype).save_pretrained(flux / "text_encoder")
        (flux / "tokenizer").mkdir()
        (flux / "tokenizer" / "vocab.json").write_text(json.dumps(WORDS))
        (flux / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
        (flux / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 77}')
        found["wan", dtype] = [wan / "text_encoder"], [wan / "tokenizer"]
        found["flux", dtype] = [[flux / (name + end) for end in ("", "_2")] for name in ("text_encoder", "tokenizer")]
    return found


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.fixture
def flux_copy(models, tmp_path):
    """FLUX's parts where a test may damage them."""
    encoders, tokenizers = models["flux", torch.float32]
    return [[shutil.copytree(folder, tmp_path / "flux" / folder.name) for folder in part] for part in (encoders, tokenizers)]


def pipelines_context(backbone, encoders, tokenizers):
    """What diffusers' pipeline computes for the empty text, in float32."""
    if backbone == "wan":
        encoder = transformers.UMT5EncoderModel.from_pretrained(encoders[0]).float()
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizers[0])
        parts = dict.fromkeys(("vae", "scheduler", "transformer"))
        pipeline = diffusers.WanPipeline(tokenizer=tokenizer, text_encoder=encoder, **parts)
        with torch.no_grad():
            return {"context": pipeline._get_t5_prompt_embeds("", max_sequence_length=226)[0]}
    pipeline = diffusers.FluxPipeline(
        text_encoder=transformers.CLIPTextModel.from_pretrained(encoders[0]).float(),
        text_encoder_2=transformers.T5EncoderModel.from_pretrained(encoders[1]).float(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizers[0]),
        tokenizer_2=transformers.T5TokenizerFast.from_pretrained(tokenizers[1]),
        **dict.fromkeys(("vae", "scheduler", "transformer")),
    )
    with torch.no_grad():
        context = pipeline._get_t5_prompt_embeds("", max_sequence_length=512)[0]
        return {"context": context, "pooled": pipeline._get_clip_prompt_embeds("")[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backbone", ["wan", "flux"])
def test_the_context_is_what_diffusers_pipelines_compute(models, backbone, dtype):
    if backbone == "wan" and diffusers.__version__.startswith("0.35."):
        pytest.importorskip("ftfy", reason="the Wan pipeline of diffusers 0.35 cannot do without ftfy")
    ours = text.encode_empty(backbone, *models[backbone, dtype], device="cpu")
    theirs = pipelines_context(backbone, *models[backbone, dtype])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


def test_wans_padding_is_zero_and_fluxs_is_not(models):
    wan = text.encode_empty("wan", *models["wan", torch.float32])["context"]
    flux = text.encode_empty("flux", *models["flux", torch.float32])["context"]
    assert (wan.shape, flux.shape) == ((226, 20), (512, 20))
    assert wan[0].all()
    assert not wan[1:].any()
    assert flux.all()
    assert len(flux.unique(dim=0)) > 2  # the end token, and padding that differs by its distance from it


def test_a_large_encoder_is_held_as_bf16(models, monkeypatch):
    exact = text.encode_empty("wan", *models["wan", torch.float32])["context"]
    monkeypatch.setattr(text, "LARGE", 1000)
    rounded = text.encode_empty("wan", *models["wan", torch.float32])["context"]
    assert not torch.equal(rounded, exact)
    # Weights round by at most 2^-9 relative; a block passes through 7 of them in a row, there are 3 and the embedding.
    assert (rounded - exact).norm() / exact.norm() < 22 * 2**-9


def test_weights_are_held_as_stored_before_and_after_a_run(models):
    model = transformers.T5EncoderModel.from_pretrained(models["flux", torch.bfloat16][0][1], dtype="auto")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text._compute_in_float32(model.encoder.block, model.encoder.final_layer_norm)
    blocks, seen = model.encoder.block, []
    blocks[1].layer[0].register_forward_hook(lambda *_: seen.append([next(block.parameters()).dtype for block in blocks]))
    model(inputs_embeds=torch.randn(1, 5, 20))
    assert seen == [[torch.bfloat16, torch.float32]]  # one block at a time
    for name, tensor in blocks.state_dict(prefix="encoder.block.").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])


def test_the_encoders_run_once_a_model(models, cache, monkeypatch):
    first = text.empty_context("flux", "org/model@1", *models["flux", torch.float32])
    (file,) = cache.iterdir()
    assert file == text.context_file("flux", "org/model@1")
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": text.FORMAT, "backbone": "flux", "identity": "org/model@1"}
    monkeypatch.setattr(text, "encode_empty", None)
    again = text.empty_context("flux", "org/model@1", [], [])  # no folder is needed any more
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)
    with pytest.raises(TypeError):
        text.empty_context("flux", "org/model@2", [], [])


def test_a_model_without_a_cached_context_has_none(cache):
    assert text.cached_context("wan", "org/model@1") is None
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "junk", "other backbone"])
def test_a_damaged_cache_file_is_told_and_made_again(models, caplog, damage):
    first = text.empty_context("wan", "m", *models["wan", torch.float32])
    file = text.context_file("wan", "m")
    content = file.read_bytes()
    if damage == "other backbone":
        text.save_context(file, "flux", "m", {"context": torch.ones(512, 4), "pooled": torch.ones(3)})
    else:
        file.write_bytes({"cut": content[:-1], "empty": b"", "junk": b"junk" * 99}[damage])
    with caplog.at_level(logging.WARNING, "ebr_engine"):
        again = text.empty_context("wan", "m", *models["wan", torch.float32])
    assert torch.equal(first["context"], again["context"])
    assert str(file) in caplog.text
    assert torch.equal(text.load_context(file, "wan")["context"], first["context"])


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(models, cache, caplog):
    cache.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "ebr_engine"):
        assert text.empty_context("wan", "m", *models["wan", torch.float32])["context"].shape == (226, 20)
    assert "not kept" in caplog.text


@pytest.mark.parametrize(
    "identities",
    [("org/a-b@1", "org/a_b@1", "org-a-b@1"), ("x" * 300, "x" * 301), ("../../etc", "..\\..\\etc", "ü/é", "")],
)
def test_file_names_are_safe_and_differ_by_model(cache, identities):
    files = [text.context_file(backbone, identity) for identity in identities for backbone in ("wan", "flux")]
    assert len(set(files)) == len(files)
    for file in files:
        assert file.parent == cache
        assert re.fullmatch(r"(wan|flux)-[A-Za-z0-9.-]{,100}\.safetensors", file.name)


def test_several_writers_leave_one_whole_file(cache):
    contexts = [{"context": torch.full((226, 64), float(number))} for number in range(8)]
    file = text.context_file("wan", "m")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda context: text.save_context(file, "wan", "m", context), contexts * 4))
    assert [path.name for path in cache.iterdir()] == [file.name]
    assert text.load_context(file, "wan")["context"].unique().numel() == 1


def wan(rows=226, fill=1.0):
    return {"context": torch.full((rows, 4), fill)}


def flux(rows=512, pooled=(3,)):
    return {"context": torch.ones(rows, 4), "pooled": torch.ones(pooled)}


def test_a_saved_context_comes_back_as_float32(tmp_path):
    context = {"context": torch.randn(512, 5).bfloat16(), "pooled": torch.randn(3, dtype=torch.float64)}
    text.save_context(tmp_path / "new" / "c.safetensors", "flux", "m", context)
    loaded = text.load_context(tmp_path / "new" / "c.safetensors", "flux")
    assert loaded.keys() == context.keys()
    assert all(torch.equal(loaded[name], context[name].float()) and loaded[name].dtype == torch.float32 for name in loaded)


@pytest.mark.parametrize(
    ("backbone", "tensors", "words"),
    [
        ("wan", wan(512), ["context", "[512, 4]", "[226, D]"]),
        ("wan", {"context": torch.ones(1, 226, 4)}, ["[1, 226, 4]"]),
        ("wan", {"context": torch.ones(226, 0)}, ["[226, 0]"]),
        ("wan", wan(fill=float("nan")), ["context", "finite"]),
        ("wan", wan(fill=float("inf")), ["context", "finite"]),
        ("wan", flux(226), ["unknown", "pooled"]),
        ("wan", {}, ["lacks", "context"]),
        ("flux", wan(512), ["lacks", "pooled"]),
        ("flux", flux(256), ["[256, 4]", "[512, D]"]),
        ("flux", flux(pooled=(1, 3)), ["pooled", "[1, 3]"]),
        ("flux", flux(pooled=()), ["pooled", "[]"]),
    ],
)
def test_what_is_no_context_is_neither_read_nor_written(tmp_path, backbone, tensors, words):
    file = tmp_path / "c.safetensors"
    with pytest.raises(BackboneError) as refused:
        text.save_context(file, backbone, "m", tensors)
    assert not file.exists()
    save_file(tensors, file, {"format": text.FORMAT, "backbone": backbone})
    with pytest.raises(BackboneError, match=re.escape(str(file))) as unread:
        text.load_context(file, backbone)
    for word in words:
        assert word in str(refused.value)
        assert word in str(unread.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"no such context file: .*nowhere"):
        text.load_context(tmp_path / "nowhere", "wan")
    save_file(wan(), tmp_path / "plain.safetensors")
    with pytest.raises(BackboneError, match="format is None"):
        text.load_context(tmp_path / "plain.safetensors", "wan")
    text.save_context(tmp_path / "wan.safetensors", "wan", "m", wan())
    with pytest.raises(BackboneError, match="the wan backbone, not of flux"):
        text.load_context(tmp_path / "wan.safetensors", "flux")
    with pytest.raises(BackboneError, match=r"mini.*wan, .*flux"):
        text.save_context(tmp_path / "mini.safetensors", "mini", "m", wan())
    with pytest.raises(BackboneError, match="cannot write"):
        text.save_context(tmp_path / "wan.safetensors" / "c.safetensors", "wan", "m", wan())


def refused(encoders, tokenizers, *words, backbone="flux"):
    with pytest.raises(BackboneError) as error:
        text.empty_context(backbone, "m", encoders, tokenizers, device="cpu")
    for word in words:
        assert word in str(error.value)
    assert not text.context_file(backbone, "m").exists()


REMEDY = ("--context FILE", "ebr-engine cache-text --backbone flux")


def test_missing_parts_are_named_with_the_remedy(flux_copy, models):
    encoders, tokenizers = flux_copy
    refused([], [], "text_encoder folder", "--context FILE", "cache-text --backbone wan", backbone="wan")
    refused(*[[], tokenizers], "no text_encoder folder", *REMEDY)
    refused(encoders[:1], tokenizers, "no text_encoder_2 folder", *REMEDY)
    refused(encoders, tokenizers[:1], "no tokenizer_2 folder", *REMEDY)
    refused([encoders[0], encoders[0] / "gone"], tokenizers, "gone", *REMEDY)
    (tokenizers[0] / "vocab.json").unlink()
    refused(encoders, tokenizers, "tokenizer.json", str(tokenizers[0]), *REMEDY)
    (encoders[1] / "model.safetensors").rename(encoders[1] / "model.bin")
    refused(encoders, models["flux", torch.float32][1], ".safetensors", str(encoders[1]), *REMEDY)
    (encoders[1] / "config.json").unlink()
    refused(encoders, models["flux", torch.float32][1], "config.json", str(encoders[1]), *REMEDY)


def test_an_incomplete_encoder_is_not_filled_with_random_numbers(flux_copy):
    file = flux_copy[0][1] / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, file, {"format": "pt"})
    refused(*flux_copy, str(file.parent), "lacks 1 weights", "block.1.layer.0.SelfAttention.q.weight")


@pytest.mark.parametrize("damage", ["cut", "junk", "config", "sizes", "missing shard"])
def test_a_damaged_encoder_is_named(flux_copy, damage):
    folder = flux_copy[0][1]
    file, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "junk":
        file.write_bytes(b"junk" * 99)
    elif damage == "config":
        config.write_text("{")
    elif damage == "sizes":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"d_ff": 16}))
    else:
        shard = "model-00001-of-00002.safetensors"
        file.rename(folder / shard)
        weight_map = {"shared.weight": shard, "encoder.final_layer_norm.weight": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    refused(*flux_copy, "cannot read the text encoder", str(folder))


def test_parts_of_another_model_are_refused(flux_copy, tmp_path):
    encoders, tokenizers = flux_copy
    older = int(transformers.__version__.split(".")[0]) < 5  # which cannot read a T5's files as a CLIP's at all
    words = ("cannot read the tokenizer",) if older else ("more words", str(encoders[0]))
    refused(encoders, tokenizers[::-1], str(tokenizers[1]), *words)
    transformers.CLIPTokenizer.from_pretrained(tokenizers[0]).save_pretrained(tmp_path / "words")
    refused([encoders[1]], [tmp_path / "words"], "makes 2 of 226", "expected 1 of 226", str(tmp_path / "words"), backbone="wan")
    refused([encoders[1]], [tokenizers[1]], "'t5'", "umt5", backbone="wan")
    refused(encoders[::-1], tokenizers, "'t5'", "clip_text_model")
    (tokenizers[1] / "tokenizer.json").write_text("{")
    refused(encoders, tokenizers, "cannot read the tokenizer", str(tokenizers[1]))


@pytest.mark.parametrize("package", ["transformers", "sentencepiece"])
def test_without_an_optional_package_the_install_line_is_told(models, flux_copy, monkeypatch, package):
    encoders, tokenizers = flux_copy
    if package == "transformers":
        monkeypatch.setitem(sys.modules, package, None)
    else:
        monkeypatch.setattr(text, "find_spec", lambda name: None)
        (tokenizers[1] / "tokenizer.json").rename(tokenizers[1] / "spiece.model")
    with pytest.raises(EbrError, match=rf"{package}.*pip install 'ebr-engine\[models\]'"):
        text.encode_empty("flux", encoders, tokenizers)


def test_transformers_is_as_talkative_afterwards_as_before(models, capfd):
    logging_ = transformers.utils.logging
    before = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    text.encode_empty("wan", *models["wan", torch.float32])
    assert (logging_.get_verbosity(), logging_.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
