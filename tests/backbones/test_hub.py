"""What is asked of the hub, and what is said when it gives nothing."""

import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from ebr_engine.backbones.hub import fetch
from ebr_engine.errors import BackboneError, EbrError

PARTS = ("transformer", "vae")


@pytest.fixture
def calls(monkeypatch):
    """Keyword arguments of every fetch, which all succeed."""
    made = []

    def snapshot_download(repo_id, **arguments):
        made.append({"id": repo_id, **arguments})
        return "/cache/snapshots/0123"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return made


def test_only_the_parts_asked_for_are_fetched_and_weights_as_safetensors(calls):
    assert fetch("a/b", "v2", True, PARTS) == Path("/cache/snapshots/0123")
    fetch("a/b", None, False, ("text_encoder", "tokenizer"))
    fetch("a/b", None, False, ("transformer",), ("first", "second"))
    asked = [(call["id"], call["revision"], call["local_files_only"]) for call in calls]
    assert asked == [("a/b", "v2", True), *[("a/b", None, False)] * 2]
    assert [sorted(call["allow_patterns"]) for call in calls] == [
        [
            "model_index.json",
            "transformer/*.json",
            "transformer/*.safetensors",
            "transformer/config.json",
            "vae/*.json",
            "vae/*.safetensors",
        ],
        ["model_index.json", "text_encoder*/*.json", "text_encoder*/*.safetensors", "tokenizer*/*", "transformer/config.json"],
        ["first/*.json", "first/*.safetensors", "first/config.json", "model_index.json"]
        + ["second/*.json", "second/*.safetensors", "second/config.json"],
    ]


def test_a_part_that_no_model_has_is_a_mistake_of_the_caller(calls):
    with pytest.raises(ValueError, match=r"unknown part\(s\) decoder; there is: transformer, vae"):
        fetch("a/b", None, False, ("vae", "decoder"))
    assert not calls


def answer(kind, status):
    """An exception that the hub's library raises for an HTTP status."""
    return kind(f"{status} Client Error\nRequest id", response=SimpleNamespace(headers={}, status_code=status, request=None))


@pytest.mark.parametrize(
    ("error", "offline", "message"),
    [
        (
            answer(errors.GatedRepoError, 403),
            False,
            r"gated.* accept its licence at https://huggingface\.co/a/b, .*HF_TOKEN",
        ),
        (answer(errors.RepositoryNotFoundError, 404), False, r"a/b is no file or folder here and no public model on the hub"),
        (answer(errors.RevisionNotFoundError, 404), False, r"a/b has no revision 'v1'"),
        (answer(errors.HfHubHTTPError, 500), False, r"cannot fetch a/b at revision 'v1' .*: 500 Client Error$"),
        (errors.LocalEntryNotFoundError("none"), True, r"a/b at revision 'v1' is not, or not completely, in the local cache"),
        (errors.LocalEntryNotFoundError("none"), False, r"the hub cannot be reached .*check the network"),
        (OSError(28, "No space left on device"), False, r"run again to resume.*No space left"),
        (TimeoutError(), False, r"cannot fetch a/b.*TimeoutError"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(monkeypatch, error, offline, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(BackboneError, match=message) as caught:
        fetch("a/b", "v1", offline, PARTS)
    assert "\n" not in str(caught.value)


def test_offline_the_library_itself_finds_nothing_in_an_empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match="a/b is not, or not completely, in the local cache"):
        fetch("a/b", None, True, PARTS)


def test_offline_what_is_cached_is_found_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--a--b" / "snapshots" / commit
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text("{}")
    assert fetch("a/b", commit, True, PARTS) == folder


def test_without_the_library_the_install_line_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EbrError, match=r"pip install 'ebr-engine\[models\]'"):
        fetch("a/b", None, False, PARTS)
