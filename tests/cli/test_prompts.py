"""`ebr-engine prompts`: what it lists, what it shows, what it imports and what it leaves alone."""

import pytest
import torch

from ebr_engine.catalogue import TASKS
from ebr_engine.prompts import Prompt, load_prompt


@pytest.fixture(autouse=True)
def wide(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "installed"))


def released(path, blocks=3, tokens=5, width=8):
    """A prompt file as the authors' code writes it."""
    alphas = [torch.tensor(0.1 * (i + 1)) for i in range(blocks)]
    torch.save({"backend": "wan2.1", "deep_prompt_bank": {"prompts": torch.randn(1, tokens, width)}, "alphas": alphas}, path)
    return path


def refused(result, *words):
    code, stdout, stderr = result
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) == 1
    for word in words:
        assert word in stderr


def test_a_released_prompt_is_imported(cli, tmp_path):
    source = released(tmp_path / "wan_haze.pt")
    code, stdout, stderr = cli("prompts", "import", source, "-o", "new/haze.safetensors")
    assert (code, stderr) == (0, "")
    assert f"{source} -> new/haze.safetensors" in stdout
    for word in ("wan", "haze", "(5, 8)"):
        assert word in stdout
    prompt, content = load_prompt(tmp_path / "new" / "haze.safetensors"), torch.load(source)
    assert (prompt.backbone, prompt.task, prompt.base_model, prompt.injection) == ("wan", "haze", "wan2.1", "dual")
    assert torch.equal(prompt.residual, content["deep_prompt_bank"]["prompts"][0])
    torch.testing.assert_close(prompt.alpha, torch.tensor([0.1, 0.2, 0.3]))
    assert (prompt.t0, prompt.t_min, prompt.steps) == (0.4, 1e-4, 20)


def test_an_existing_file_is_replaced_on_request_only(cli, tmp_path):
    source, out = released(tmp_path / "wan_rain.pt"), tmp_path / "rain.safetensors"
    out.write_bytes(b"precious")
    refused(cli("prompts", "import", source, "-o", out), "rain.safetensors", "exists", "--overwrite")
    assert out.read_bytes() == b"precious"
    assert cli("prompts", "import", source, "-o", out, "--overwrite")[0] == 0
    assert load_prompt(out).task == "rain"


@pytest.mark.parametrize("name", ["haze.pt", "haze", "haze.safetensors.bak"])
def test_a_wrong_suffix_is_refused_before_anything_is_written(cli, tmp_path, name):
    refused(cli("prompts", "import", released(tmp_path / "wan_haze.pt"), "-o", f"out/{name}"), name, ".safetensors")
    assert not (tmp_path / "out").exists()


class Malicious:
    def __reduce__(self):
        return print, ("code of the file has run",)


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "other", "malicious", "cut"])
def test_what_is_no_released_prompt_is_told_in_one_line(cli, tmp_path, kind):
    source = tmp_path / "bad.pt"
    if kind == "text":
        source.write_text("hello")
    elif kind == "empty":
        source.touch()
    elif kind == "other":
        torch.save({"weights": torch.ones(2)}, source)
    elif kind == "malicious":
        torch.save(Malicious(), source)
    elif kind == "cut":
        source.write_bytes(released(tmp_path / "wan_haze.pt").read_bytes()[:400])
    refused(cli("prompts", "import", source, "-o", "out.safetensors"), "bad.pt")
    assert not (tmp_path / "out.safetensors").exists()
    refused(cli("prompts", "show", source), "bad.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_show_tells_what_a_file_holds(cli, tmp_path, suffix):
    file = tmp_path / f"wan_snow{suffix}"
    if suffix == ".pt":
        released(file)
    else:
        alpha = torch.tensor([0.1, 0.2, 0.3])
        training = {"iterations": 123, "bridge": "ebr"}
        Prompt(torch.randn(5, 8), alpha, "wan", task="snow", base_model="wan2.1", training=training).save(file)
    code, stdout, stderr = cli("prompts", "show", file)
    assert (code, stderr) == (0, "")
    for word in (str(file), "wan (wan2.1)", "snow", "dual", "(5, 8)", "mean 0.2, 0.1 to 0.3", "T0 0.4", "20 steps"):
        assert word in stdout
    if suffix == ".safetensors":
        assert "training: iterations  123" in stdout


def test_show_refuses_what_is_no_prompt(cli, tmp_path):
    refused(cli("prompts", "show", "nowhere.safetensors"), "nowhere.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    refused(cli("prompts", "show", "junk.safetensors"), "junk.safetensors")


def test_the_list_has_every_bundled_task(cli):
    code, stdout, stderr = cli("prompts", "list")
    assert (code, stderr) == (0, "")
    header, *rows = stdout.splitlines()
    assert header.split() == ["backbone", "task", "T0", "steps", "tokens", "file"]
    listed = {row.split()[1]: row for row in rows}
    assert sorted(listed) == sorted(TASKS)
    assert all(row.startswith("mini") and row.rstrip().endswith(f"{task}.safetensors") for task, row in listed.items())


def test_the_list_has_what_the_user_installed_in_place_of_what_is_bundled(cli, tmp_path):
    folder = tmp_path / "installed" / "mini"
    for task, tokens in (("haze", 3), ("moire", 7)):
        Prompt(torch.randn(tokens, 256), torch.ones(6), "mini", task=task, t0=0.25).save(folder / f"{task}.safetensors")
    rows = {row.split()[1]: row.split() for row in cli("prompts", "list")[1].splitlines()[1:]}
    assert rows["moire"] == ["mini", "moire", "0.25", "20", "7", str(folder / "moire.safetensors")]
    assert rows["haze"][4:] == ["3", str(folder / "haze.safetensors")]
    assert set(rows) == {*TASKS, "moire"}


def test_help_is_shown_without_a_command(cli):
    _, stdout, _ = cli("prompts")
    for name in ("list", "show", "import"):
        assert name in stdout
