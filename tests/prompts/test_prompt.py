"""Prompt files: what is written is read, released files are converted without unpickling, and bad files are named in a line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ebr_engine.errors import PromptError
from ebr_engine.prompts.mixing import mixed_weights, scaled
from ebr_engine.prompts.prompt import FORMAT, Prompt, load_prompt

RELEASED = Path(__file__).parents[3] / "shared" / "released_prompts"
METADATA = {"format": FORMAT, "backbone": "mini", "t0": "0.4", "t_min": "0.0001", "steps": "20", "training": "{}"}


@pytest.fixture
def prompt():
    summary = {"iterations": 250, "loss": [0.5, 0.25], "data": "Bäume"}
    rest = {"task": "haze", "base_model": "mini 1", "t0": 0.15, "t_min": 2e-4, "steps": 7, "training": summary}
    return Prompt(torch.randn(5, 8), torch.randn(3), "mini", **rest)


def tensors():
    return {"residual": torch.randn(5, 8), "alpha": torch.randn(3)}


def released(backend="wan", **changes):
    """What a released file holds, with random values."""
    bank = {"prompts": torch.randn(1, 6, 8)}
    return {"backend": backend, "deep_prompt_bank": bank, "alphas": [torch.tensor(0.1), torch.tensor(-0.2)]} | changes


def refusal(path):
    """The message with which a file is refused: one line that names the file."""
    with pytest.raises(PromptError) as error:
        load_prompt(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def assert_equal(one, other):
    assert torch.equal(one.residual, other.residual)
    assert torch.equal(one.alpha, other.alpha)
    names = ("backbone", "task", "base_model", "t0", "t_min", "steps", "training", "injection")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]


def test_a_saved_prompt_is_read_back(prompt, tmp_path):
    path = tmp_path / "deep" / "er" / "haze.safetensors"
    prompt.save(path)
    assert_equal(load_prompt(path), prompt)
    assert_equal(load_prompt(str(path)), prompt)
    assert list(path.parent.iterdir()) == [path]


def test_a_prompt_for_each_block_is_read_back(prompt, tmp_path):
    own = replace(prompt, residual=torch.randn(3, 5, 8))
    own.save(tmp_path / "own.safetensors")
    read = load_prompt(tmp_path / "own.safetensors")
    assert torch.equal(read.residual, own.residual)
    read.check("mini", 8, 3)


def test_the_file_holds_what_the_format_promises(prompt, tmp_path):
    prompt.save(tmp_path / "haze.safetensors")
    with safe_open(tmp_path / "haze.safetensors", "pt") as file:
        assert set(file.keys()) == {"residual", "alpha"}
        assert {file.get_tensor(name).dtype for name in ("residual", "alpha")} == {torch.float32}
        metadata = file.metadata()
    assert json.loads(metadata.pop("training")) == prompt.training
    assert metadata == {
        "format": FORMAT,
        "backbone": "mini",
        "base_model": "mini 1",
        "injection": "dual",
        "task": "haze",
        "t0": "0.15",
        "t_min": "0.0002",
        "steps": "7",
    }


def test_a_prompt_being_learned_is_saved_as_float32(tmp_path):
    residual = torch.randn(8, 5, requires_grad=True).T  # not contiguous
    Prompt(residual, torch.randn(3, dtype=torch.float64, requires_grad=True), "wan").save(tmp_path / "x.safetensors")
    loaded = load_prompt(tmp_path / "x.safetensors")
    assert torch.equal(loaded.residual, residual)
    assert loaded.alpha.dtype == torch.float32
    assert not loaded.residual.requires_grad


def test_saving_replaces_an_older_prompt(prompt, tmp_path):
    path = tmp_path / "haze.safetensors"
    scaled(prompt, 3.0).save(path)
    prompt.save(path)
    assert_equal(load_prompt(path), prompt)


@pytest.mark.parametrize("obstacle", ["a folder of that name", "a file for a folder"])
def test_a_failed_save_is_told_and_leaves_nothing(prompt, tmp_path, obstacle):
    path = tmp_path / "out" / "haze.safetensors"
    if obstacle == "a folder of that name":
        path.mkdir(parents=True)
    else:
        path.parent.write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PromptError, match="cannot write") as error:
        prompt.save(path)
    assert str(path) in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_save_that_breaks_off_keeps_the_older_prompt(prompt, tmp_path, monkeypatch):
    path = tmp_path / "haze.safetensors"
    prompt.save(path)

    def full(content, target, metadata):
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("ebr_engine.tensor_files.save_file", full)
    with pytest.raises(PromptError, match="No space left on device"):
        scaled(prompt, 2.0).save(path)
    assert_equal(load_prompt(path), prompt)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("backend", "backbone", "injection"),
    [("wan", "wan", "dual"), ("Wan2.1-T2V-1.3B", "wan", "dual"), ("flux", "flux", "add"), ("flux2", "flux2", "add")],
)
def test_a_released_file_is_converted(tmp_path, backend, backbone, injection):
    content = released(backend)
    torch.save(content, tmp_path / f"{backbone}_lowlight.pt")
    prompt = load_prompt(tmp_path / f"{backbone}_lowlight.pt")
    assert torch.equal(prompt.residual, content["deep_prompt_bank"]["prompts"][0])
    assert torch.equal(prompt.alpha, torch.tensor([0.1, -0.2]))
    assert (prompt.backbone, prompt.injection, prompt.task, prompt.base_model) == (backbone, injection, "lowlight", backend)
    assert (prompt.t0, prompt.t_min, prompt.steps) == (0.4, 1e-4, 20)
    prompt.save(tmp_path / "converted.safetensors")
    assert_equal(load_prompt(tmp_path / "converted.safetensors"), prompt)


def test_a_released_file_may_be_in_low_precision_or_the_older_layout(tmp_path):
    content = released(alphas=[torch.tensor([0.5], dtype=torch.bfloat16), torch.nn.Parameter(torch.tensor(0.25))])
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    prompt = load_prompt(tmp_path / "x.pth")
    assert prompt.alpha.tolist() == [0.5, 0.25]
    assert prompt.alpha.dtype == torch.float32
    assert not prompt.alpha.requires_grad


@pytest.mark.skipif(not RELEASED.is_dir(), reason=f"the authors' released prompts are not in {RELEASED}")
@pytest.mark.parametrize("task", ["blur", "haze", "lowlight", "rain", "snow"])
def test_the_authors_prompts_are_read(task, tmp_path):
    prompt = load_prompt(RELEASED / f"wan_{task}.pt")
    prompt.check("wan", 1536, 30)
    assert prompt.residual.shape == (226, 1536)
    assert prompt.alpha.shape == (30,)
    assert prompt.task == task
    assert prompt.residual.std() > 1e-3
    assert prompt.alpha.abs().min() > 0
    raw = torch.load(RELEASED / f"wan_{task}.pt", map_location="cpu", weights_only=True)
    assert torch.equal(prompt.residual, raw["deep_prompt_bank"]["prompts"][0].float())
    assert prompt.alpha.tolist() == [float(alpha) for alpha in raw["alphas"]]
    prompt.save(tmp_path / f"{task}.safetensors")
    assert_equal(load_prompt(tmp_path / f"{task}.safetensors"), prompt)


class Payload:
    """Makes a file when it is unpickled freely."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


@pytest.mark.parametrize("place", ["whole", "alphas", "backend"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, place, zipped, suffix):
    victim = tmp_path / "executed"
    payload = Payload(victim)
    content = {"whole": payload, "alphas": released(alphas=[payload]), "backend": released(backend=payload)}[place]
    torch.save(content, tmp_path / "evil", _use_new_zipfile_serialization=zipped)
    torch.load(tmp_path / "evil", weights_only=False)
    assert victim.exists()  # the payload works where it is let
    victim.unlink()
    refusal((tmp_path / "evil").rename(tmp_path / f"evil{suffix}"))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "is not a released prompt"),
        ({"backend": "wan"}, "is not a released prompt"),
        (released(alphas=[]), "is not a released prompt"),
        (released(alphas=[torch.ones(2)]), "is not a released prompt"),
        (released(deep_prompt_bank={"prompts": [1.0, 2.0]}), "is not a released prompt"),
        (released(deep_prompt_bank={"prompts": torch.ones(2, 3, 4)}), "wrong shapes: residual (2, 3, 4)"),
        (released("sd3"), "unknown backbone, 'sd3'"),
        (released(alphas=[torch.tensor(float("nan"))]), "not finite"),
    ],
)
def test_other_pt_files_are_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "x.pt")
    assert reason in refusal(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pt_files_are_refused(tmp_path, zipped):
    path = tmp_path / "x.pt"
    torch.save(released(), path, _use_new_zipfile_serialization=zipped)
    assert load_prompt(path).residual.shape == (6, 8)
    whole = path.read_bytes()
    for share in range(20):
        path.write_bytes(whole[: len(whole) * share // 20])
        refusal(path)


def test_truncated_safetensors_files_are_refused(prompt, tmp_path):
    path = tmp_path / "x.safetensors"
    prompt.save(path)
    whole = path.read_bytes()
    for share in range(20):
        path.write_bytes(whole[: len(whole) * share // 20])
        refusal(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "no such prompt file" in refusal(tmp_path / "nothing.safetensors")
    assert "no such prompt file" in refusal(tmp_path / "nothing.pt")
    assert "no such prompt file" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".png", ""])
def test_files_of_another_kind_are_refused(tmp_path, suffix):
    (tmp_path / f"x{suffix}").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    refusal(tmp_path / f"x{suffix}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "ebr-engine prompt 99"}, "its format is 'ebr-engine prompt 99', expected 'ebr-engine prompt 1'"),
        ({"format": None}, "its format is None"),
        ({"backbone": "sdxl"}, "unknown backbone, 'sdxl'"),
        ({"backbone": None}, "unknown backbone, None"),
        ({"t0": "1.5"}, "impossible settings"),
        ({"t0": "nan"}, "impossible settings"),
        ({"t_min": "0.5"}, "impossible settings"),
        ({"t_min": "0"}, "impossible settings"),
        ({"steps": "0"}, "impossible settings"),
        ({"steps": "many"}, "damaged metadata"),
        ({"t0": None}, "damaged metadata"),
        ({"training": "{"}, "damaged metadata"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path, changes, reason):
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path, METADATA)
    assert load_prompt(path).backbone == "mini"
    save_file(tensors(), path, {key: value for key, value in (METADATA | changes).items() if value is not None})
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"residual": torch.ones(8)}, "wrong shapes: residual (8,), alpha (3,); expected [L, D] or [blocks, L, D], and [blocks]"),
        ({"alpha": torch.ones(3, 1)}, "wrong shapes"),
        ({"residual": torch.ones(2, 4, 8)}, "wrong shapes: residual (2, 4, 8), alpha (3,)"),
        ({"residual": torch.ones(1, 1, 4, 8)}, "wrong shapes"),
        ({"residual": torch.ones(0, 8)}, "wrong shapes"),
        ({"alpha": torch.ones(0)}, "wrong shapes"),
        ({"residual": torch.tensor([[1.0, float("nan")]])}, "not finite"),
        ({"alpha": torch.tensor([float("-inf")])}, "not finite"),
        ({"alpha": None}, "is not a prompt file"),
        ({"residual": None}, "is not a prompt file"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, changes, reason):
    content = {key: value for key, value in (tensors() | changes).items() if value is not None}
    save_file(content, tmp_path / "x.safetensors", METADATA)
    assert reason in refusal(tmp_path / "x.safetensors")


def test_a_prompt_for_another_backbone_width_or_depth_is_refused(prompt):
    prompt.check("mini", 8, 3)
    with pytest.raises(PromptError, match="this prompt is for the mini backbone, not for wan"):
        prompt.check("wan", 8, 3)
    for width, blocks in ((9, 3), (8, 4)):
        with pytest.raises(PromptError, match=f"has width 8 and 3 blocks; the mini backbone has width {width} and {blocks}"):
            prompt.check("mini", width, blocks)


def test_mixing_multiplies_each_alpha_by_its_weight(prompt):
    other = scaled(prompt, -2.0)
    mixed = mixed_weights([(prompt, 0.75), (other, 0.5)])
    assert torch.equal(mixed[0][0], prompt.residual)
    torch.testing.assert_close(mixed[0][1], 0.75 * prompt.alpha)
    torch.testing.assert_close(mixed[1][1], -1.0 * prompt.alpha)


def test_scaling_changes_alpha_alone(prompt):
    half = scaled(prompt, 0.5)
    torch.testing.assert_close(half.alpha, prompt.alpha / 2)
    assert torch.equal(half.residual, prompt.residual)
    assert (half.task, half.t0, half.training) == (prompt.task, prompt.t0, prompt.training)
