"""`ebr-engine prompts`: what it lists, shows, imports and installs, and what it leaves alone."""

from pathlib import Path

import pytest
import torch

from ebr_engine.prompts.catalogue import ASSETS, TASKS, find_prompt
from ebr_engine.prompts.prompt import Prompt, load_prompt

RELEASED = Path(__file__).parents[3] / "shared" / "released_prompts"
FINE = tuple(f"fine/{file.stem}" for file in (ASSETS / "mini" / "prompts" / "fine").glob("*.safetensors"))


@pytest.fixture(autouse=True)
def wide(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path / "installed"))


def released(path, blocks=3, tokens=5, width=8, backend="wan2.1"):
    """A prompt file as the authors' code writes it."""
    alphas = [torch.tensor(0.1 * (i + 1)) for i in range(blocks)]
    torch.save({"backend": backend, "deep_prompt_bank": {"prompts": torch.randn(1, tokens, width)}, "alphas": alphas}, path)
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


def two(folder, **other):
    """A prompt, and one that went on from it."""
    start = Prompt(torch.zeros(5, 8), torch.full((3,), 0.2), "wan", task="rain", training={"iterations": 5})
    start.save(folder / "one.safetensors")
    how = {"task": "rain", "training": {"iterations": 9}} | other
    Prompt(torch.ones(5, 8), torch.full((3,), 0.6), "wan", **how).save(folder / "two.safetensors")
    return folder / "one.safetensors", folder / "two.safetensors"


def test_the_prompt_between_two_is_written(cli, tmp_path):
    out = tmp_path / "between.safetensors"
    code, stdout, stderr = cli("prompts", "average", *two(tmp_path), "-o", out, "--share", "0.25")
    assert (code, stderr) == (0, "")
    assert "0.25 of the second" in stdout
    found = load_prompt(out)
    assert torch.allclose(found.residual, torch.full((5, 8), 0.25))
    assert torch.allclose(found.alpha, torch.full((3,), 0.3))
    assert found.training == {"iterations": 9, "averaged": 0.25}
    refused(cli("prompts", "average", *two(tmp_path), "-o", out), "--overwrite")
    assert cli("prompts", "average", *two(tmp_path), "-o", out, "--overwrite")[0] == 0
    assert torch.allclose(load_prompt(out).residual, torch.full((5, 8), 0.5))


@pytest.mark.parametrize(
    "other",
    [
        {"task": "snow"},
        {"base_model": "wan2.2"},
        {"t0": 0.3},
        {"steps": 3},
        {"detail": "input"},
        {"supersample": 2},
        {"deconvolve": True},
    ],
)
def test_prompts_that_are_not_run_alike_are_not_averaged(cli, tmp_path, other):
    refused(cli("prompts", "average", *two(tmp_path, **other), "-o", tmp_path / "out.safetensors"), *other)
    assert not (tmp_path / "out.safetensors").exists()


def test_nor_are_prompts_of_other_sizes_or_by_an_impossible_share(cli, tmp_path):
    one, _ = two(tmp_path)
    wide = tmp_path / "wide.safetensors"
    Prompt(torch.ones(6, 8), torch.ones(3), "wan", task="rain").save(wide)
    refused(cli("prompts", "average", one, wide, "-o", tmp_path / "out.safetensors"), "(5, 8)", "(6, 8)")
    refused(cli("prompts", "average", one, one, "-o", tmp_path / "out.safetensors", "--share", "1.5"), "between 0 and 1")


def test_a_bundled_prompt_lies_between_two():
    assert load_prompt(ASSETS / "mini" / "prompts" / "fine" / "rain.safetensors").training["averaged"] == 0.3


def listed(cli):
    """The rows of `prompts list` by (backbone, task), and what follows the table."""
    code, stdout, stderr = cli("prompts", "list")
    assert (code, stderr) == (0, "")
    header, *lines = stdout.splitlines()
    assert header.split() == ["backbone", "task", "T0", "steps", "tokens", "origin", "file"]
    rows = [line.split() for line in lines if line.rstrip().endswith(".safetensors")]
    return {tuple(row[:2]): row[2:] for row in rows}, lines[len(rows) :]


def test_the_list_has_every_bundled_task(cli):
    rows, rest = listed(cli)
    sound = {("mini-audio", task) for task in ("noise", "clipping", "reverb")}
    assert set(rows) == {("mini", task) for task in (*TASKS, *FINE)} | sound
    assert all(row[3] == "bundled" and row[4].endswith(f"{task}.safetensors") for (_, task), row in rows.items())
    assert rest == []


def test_the_list_has_what_the_user_installed_in_place_of_what_is_bundled(cli, tmp_path):
    folder = tmp_path / "installed"
    for backbone, task, tokens in (("mini", "haze", 3), ("mini", "moire", 7), ("flux", "haze", 512), ("wan", "snow", 226)):
        prompt = Prompt(torch.randn(tokens, 256), torch.ones(6), backbone, task=task, t0=0.25)
        prompt.save(folder / backbone / f"{task}.safetensors")
    rows, _ = listed(cli)
    assert rows["mini", "moire"] == ["0.25", "20", "7", "yours", str(folder / "mini" / "moire.safetensors")]
    assert rows["mini", "haze"][2:] == ["3", "yours", str(folder / "mini" / "haze.safetensors")]
    assert rows["flux", "haze"][2:4] == ["512", "yours"]
    assert rows["wan", "snow"][2:4] == ["226", "yours"]
    assert rows["mini", "rain"][3] == "bundled"
    assert ("mini", "fine/haze") not in rows  # the bundled one for small pictures is left out too
    assert len([row for row in rows if row[0] != "mini-audio"]) == len(TASKS) + len(FINE) - 1 + 3


@pytest.mark.parametrize("damage", ["empty", "junk", "cut", "folder", "misplaced"])
def test_a_damaged_file_does_not_hide_the_others(cli, tmp_path, damage):
    bad, good = (tmp_path / "installed" / "wan" / f"{name}.safetensors" for name in ("[bad]", "good"))
    for file in (bad, good):
        Prompt(torch.randn(5, 8), torch.ones(3), "wan").save(file)
    if damage in ("empty", "junk", "cut"):
        bad.write_bytes({"empty": b"", "junk": b"junk" * 99, "cut": bad.read_bytes()[:-1]}[damage])
    elif damage == "folder":
        bad.unlink()
        bad.mkdir()
    else:
        Prompt(torch.randn(5, 8), torch.ones(3), "flux").save(bad)
    rows, rest = listed(cli)
    assert rows["wan", "[bad]"] == ["damaged", "yours", str(bad)]
    assert rows["wan", "good"][2:4] == ["5", "yours"]
    others = {row for row in rows if row[0] != "mini-audio"}
    assert others == {("wan", "[bad]"), ("wan", "good"), *(("mini", task) for task in (*TASKS, *FINE))}
    assert rest == ["What is wrong with a damaged one: ebr-engine prompts show FILE"]


def test_a_released_prompt_is_added_where_restore_finds_it(cli, tmp_path):
    source = released(tmp_path / "wan_rain.pt", blocks=30, width=1536)
    code, stdout, stderr = cli("prompts", "add", source)
    target = tmp_path / "installed" / "wan" / "rain.safetensors"
    assert (code, stderr) == (0, "")
    for word in (f"{source} -> {target}", "wan-1.3b", "T0 0.4", "20 steps", "restore INPUT --backbone wan --task rain"):
        assert word in stdout
    assert find_prompt("wan", "rain") == target
    prompt = load_prompt(target)
    assert (prompt.task, prompt.backbone) == ("rain", "wan")
    assert torch.equal(prompt.residual, torch.load(source)["deep_prompt_bank"]["prompts"][0])
    assert [path.name for path in target.parent.iterdir()] == ["rain.safetensors"]


@pytest.mark.parametrize(
    ("backbone", "blocks", "width", "model"),
    [
        ("wan", 30, 1536, "wan-1.3b"),
        ("wan", 40, 5120, "wan-14b"),
        ("flux", 57, 3072, "flux-dev"),
        ("mini", 6, 256, "mini"),
        ("wan22", 40, 5120, "wan22-a14b"),
    ],
)
def test_a_prompt_of_a_published_models_size_is_added_without_a_note(cli, tmp_path, backbone, blocks, width, model):
    Prompt(torch.randn(2, width), torch.ones(blocks), backbone, task="dusk").save(tmp_path / "mine.safetensors")
    code, stdout, stderr = cli("prompts", "add", "mine.safetensors", "--backbone", backbone)
    assert (code, stderr) == (0, "")
    assert f"{model}, T0" in stdout
    assert find_prompt(backbone, "dusk").is_file()


def test_a_prompt_of_other_sizes_is_added_with_a_note(cli, tmp_path):
    code, stdout, stderr = cli("prompts", "add", released(tmp_path / "flux_haze.pt", backend="flux"))
    assert code == 0
    assert stderr.startswith("note: no published flux model has width 8 and 3 blocks")
    assert "--backbone flux --task haze" in stdout


def test_the_task_can_be_named(cli, tmp_path):
    source = released(tmp_path / "v2.1 final.pt")
    refused(cli("prompts", "add", source), "'v2.1 final'", "--task")
    assert cli("prompts", "add", source, "--task", "night_rain-2")[0] == 0
    assert load_prompt(find_prompt("wan", "night_rain-2")).task == "night_rain-2"
    Prompt(torch.ones(2, 3), torch.ones(4), "wan").save(tmp_path / "unnamed.safetensors")
    assert cli("prompts", "add", "unnamed.safetensors")[0] == 0
    assert find_prompt("wan", "unnamed").is_file()


@pytest.mark.parametrize("name", ["", "a b", "../rain", "a/b", "rain.safetensors", "-rain", "ü", "rain\n"])
def test_a_name_that_is_no_file_name_is_refused(cli, tmp_path, name):
    refused(cli("prompts", "add", released(tmp_path / "wan_rain.pt"), f"--task={name}"), repr(name), "--task")
    assert not (tmp_path / "installed").exists()


def test_a_prompt_of_another_backbone_is_refused(cli, tmp_path):
    refused(cli("prompts", "add", released(tmp_path / "wan_rain.pt"), "--backbone", "flux"), "wan_rain.pt", "wan", "flux")
    assert not (tmp_path / "installed").exists()


def test_a_prompt_of_a_related_backbone_is_added_where_it_is_named(cli, tmp_path):
    source = released(tmp_path / "wan_rain.pt", blocks=40, width=5120)
    code, stdout, stderr = cli("prompts", "add", source, "--backbone", "wan22")
    assert (code, stderr) == (0, "")
    assert "wan22-a14b, T0 0.4" in stdout
    assert "--backbone wan22 --task rain" in stdout
    assert load_prompt(find_prompt("wan22", "rain")).backbone == "wan"  # what it was learned on, so that restoring can warn
    rows, _ = listed(cli)
    assert rows["wan22", "rain"][3] == "yours"
    assert ("wan", "rain") not in rows
    Prompt(torch.randn(2, 5120), torch.ones(40), "wan22").save(tmp_path / "mine.safetensors")
    refused(cli("prompts", "add", "mine.safetensors", "--backbone", "wan"), "mine.safetensors", "wan22", "wan")


def test_an_installed_prompt_is_replaced_on_request_only(cli, tmp_path):
    first, second = (released(tmp_path / f"{name}.pt") for name in ("first", "second"))
    assert cli("prompts", "add", first, "--task", "rain")[0] == 0
    file = find_prompt("wan", "rain")
    before = file.read_bytes()
    refused(cli("prompts", "add", second, "--task", "rain"), str(file), "exists", "--overwrite")
    assert file.read_bytes() == before
    assert cli("prompts", "add", second, "--task", "rain", "--overwrite")[0] == 0
    assert torch.equal(load_prompt(file).residual, torch.load(second)["deep_prompt_bank"]["prompts"][0])
    assert cli("prompts", "add", file, "--overwrite")[0] == 0  # onto itself
    assert torch.equal(load_prompt(file).residual, torch.load(second)["deep_prompt_bank"]["prompts"][0])


@pytest.mark.parametrize("kind", ["missing", "junk", "cut", "not finite", "flat"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_prompt_is_not_installed(cli, tmp_path, suffix, kind):
    file = tmp_path / f"bad{suffix}"
    residual = torch.full((5, 8), float("nan")) if kind == "not finite" else torch.ones(5) if kind == "flat" else torch.ones(5, 8)
    if suffix == ".pt":
        bank = {"prompts": residual[None]}
        torch.save({"backend": "wan2.1", "deep_prompt_bank": bank, "alphas": [torch.tensor(1.0)]}, file)
    else:
        Prompt(residual, torch.ones(3), "wan").save(file)
    if kind == "missing":
        file.unlink()
    elif kind in ("junk", "cut"):
        file.write_bytes(b"junk" * 99 if kind == "junk" else file.read_bytes()[:-30])
    refused(cli("prompts", "add", file, "--task", "rain"), file.name)
    assert not (tmp_path / "installed").exists()


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released prompts are not here")
def test_the_released_prompts_are_added_as_they_are(cli):
    for task in TASKS:
        code, stdout, stderr = cli("prompts", "add", RELEASED / f"wan_{task}.pt")
        assert (code, stderr) == (0, "")
        assert "wan-1.3b, T0 0.4, 20 steps" in stdout
        prompt, content = load_prompt(find_prompt("wan", task)), torch.load(RELEASED / f"wan_{task}.pt", "cpu")
        assert torch.equal(prompt.residual, content["deep_prompt_bank"]["prompts"][0].float())
        assert prompt.alpha.tolist() == [float(alpha) for alpha in content["alphas"]]
    rows, _ = listed(cli)
    assert all(rows["wan", task][:4] == ["0.4", "20", "226", "yours"] for task in TASKS)


def test_help_is_shown_without_a_command(cli):
    _, stdout, _ = cli("prompts")
    for name in ("list", "show", "add", "import"):
        assert name in stdout
