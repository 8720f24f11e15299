"""FLUX.2's empty text: what diffusers' pipelines make of it by a language model's hidden states, of either kind."""

import json
import shutil

import pytest
import torch

from ebr_engine.backbones import text
from ebr_engine.backbones.registry import spec
from ebr_engine.errors import BackboneError
from tests.real_layout import write_qwen_tokenizer

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
SIZES = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    """A tiny Qwen3 in the layout of klein's text encoder, and its tokenizer: (text encoders, tokenizers)."""
    folder = tmp_path_factory.mktemp("klein")
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=300, num_hidden_layers=29, **SIZES))
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.bfloat16().save_pretrained(folder / "text_encoder")
    write_qwen_tokenizer(folder / "tokenizer")
    return [folder / "text_encoder"], [folder / "tokenizer"]


def test_the_context_of_klein_is_what_diffusers_pipeline_computes(klein):
    (weights,), (words,) = klein
    encoder = transformers.Qwen3ForCausalLM.from_pretrained(weights).float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(words)
    with torch.no_grad():
        expected = diffusers.Flux2KleinPipeline._get_qwen3_prompt_embeds(encoder, tokenizer, "")[0]
    found = text.encode_empty("flux2", *klein, device="cpu")
    assert found.keys() == {"context"}
    assert found["context"].shape == (512, 48)
    torch.testing.assert_close(found["context"], expected, rtol=1e-6, atol=1e-6)
    assert len(found["context"].unique(dim=0)) > 12  # padding differs by its place, and none of it is zero
    assert found["context"].all()


def test_the_tiny_tokenizer_makes_as_many_tokens_of_nothing_as_qwens(klein):
    _, mask = text._tokenize(spec("flux2").checkpoints.text_encoders[0], klein[1][0])
    assert mask.sum() == 12
    assert mask[0, :12].all()


def test_dev_has_another_language_model_that_is_told_something(klein, tmp_path):
    """Mistral's, with the picture part that is not run; its template is told the system message of the model's training."""
    text_config = {"model_type": "mistral", "vocab_size": 300, "num_hidden_layers": 31, **SIZES}
    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Mistral3Config(text_config=text_config, vision_config=vision | {"head_dim": 8, "image_size": 32})
    torch.manual_seed(0)
    model = transformers.Mistral3ForConditionalGeneration(config)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "text_encoder")
    words = shutil.copytree(klein[1][0], tmp_path / "tokenizer")
    template = "{% for message in messages %}<|im_start|>{{ message.role }}{{ message.content[0].text }}<|im_end|>{% endfor %}"
    for file in words.iterdir():
        if file.suffix == ".jinja":
            file.write_text(template)
        elif "chat_template" in file.read_text():
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(words)
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, format_input

    with torch.no_grad():
        expected = Flux2Pipeline._get_mistral_3_small_prompt_embeds(model.eval(), tokenizer, "")[0]
    found = text.encode_empty("flux2", [tmp_path / "text_encoder"], [words], device="cpu")["context"]
    assert found.shape == (512, 48)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert list(map(dict, spec("flux2").checkpoints.text_encoders[0].instead.chat)) == format_input([""])[0]


def test_a_language_model_of_another_kind_or_depth_is_told(klein, tmp_path):
    (weights,), words = klein
    folder = shutil.copytree(weights, tmp_path / "text_encoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(BackboneError, match="of kind 'llama', expected qwen3"):
        text.encode_empty("flux2", [folder], words, device="cpu")
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=300, num_hidden_layers=3, **SIZES))
    model.save_pretrained(tmp_path / "short")
    with pytest.raises(BackboneError, match="has 3 layers, 27 or more are expected"):
        text.encode_empty("flux2", [tmp_path / "short"], words, device="cpu")


def test_a_template_that_makes_something_else_of_nothing_is_told(klein, tmp_path):
    words = shutil.copytree(klein[1][0], tmp_path / "tokenizer")
    (words / "chat_template.jinja").write_text("<|im_start|>user")
    with pytest.raises(BackboneError, match="makes 2 of 512 tokens of the empty text, expected 12 of 512"):
        text.encode_empty("flux2", klein[0], [words], device="cpu")
