"""The pages agree with the code: tables that are made, links, variables, commands, versions."""

import importlib
import json
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import pytest

from ebr_engine.backbones.registry import spec
from ebr_engine.cli.group import COMMANDS
from ebr_engine.prompts.catalogue import ASSETS, TASKS, fine_file
from ebr_engine.prompts.prompt import load_prompt
from ebr_engine.training.config import FREE, SETTINGS, read_assignments, resolve

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md"]
COMMAND = r"^ebr-engine train --task (\w+)(.*) -o (\S+)\.safetensors$"
CARDS = sorted(ASSETS.glob("*/MODEL_CARD.md"))
PAGES += [*sorted((ROOT / "docs").glob("*.md")), ROOT / "findings/README.md", *CARDS]
PLACES = ("start", "photos")  # of which a file's command has the name alone
CODE = [*(ROOT / "ebr_engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "setup.py"]


@pytest.fixture(scope="module")
def maker():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        return importlib.import_module("make_tables")


def text_of(path):
    return path.read_text(encoding="utf-8")


def anchors_of(text):
    """What a page's headings are linked by, as GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_one_page():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 130


def test_every_page_with_a_table_that_is_made_is_one_that_is_made_anew(maker):
    assert {page for page in PAGES if "<!-- made:" in text_of(page)} == set(maker.PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tables_are_those_that_the_code_makes(maker, page):
    text = text_of(page)
    assert len(maker.PART.findall(text)) == text.count("<!-- made:")
    assert maker.filled(text) == text, "python docs/make_tables.py makes them anew"


def test_a_table_that_has_changed_is_seen(maker):
    page = text_of(ROOT / "docs" / "reference.md")
    old = page.replace("| `fast` | 5 |", "| `fast` | 6 |")
    assert old != page
    assert maker.filled(old) == page


def test_the_figures_are_of_the_prompts_that_are_bundled():
    found = json.loads(text_of(ROOT / "benchmarks/results/bundled_mini.json"))
    again = "python -m benchmarks.quality evaluations --counts 2 --strengths 0.75 0 --json benchmarks/results/bundled_mini.json"
    files = {task: ASSETS / f"mini/prompts/{task}.safetensors" for task in TASKS}
    strong = {row["task"]: row for row in found["rows"] if row["strength"]}
    taken = {task: fine_file(file) or file for task, file in files.items()}
    assert found["prompts"]["bundled"] == {task: sha256(file.read_bytes()).hexdigest() for task, file in taken.items()}, again
    beside = json.loads(text_of(ROOT / "benchmarks/results/supersample.json"))["prompts"]
    assert beside["plain"] == {task: sha256(files[task].read_bytes()).hexdigest() for task in beside["plain"]}
    assert beside["finer"] == {task: sha256(taken[task].read_bytes()).hexdigest() for task in beside["finer"]}
    scores = json.loads(text_of(ASSETS / "mini/quality.json"))["scores"]
    for task in TASKS:
        told = fmean(one["psnr"] for one in scores if (one["task"], one["row"]) == (task, "EBR prompt"))
        assert told == pytest.approx(strong[task]["psnr"], abs=0.02), "ebr-engine eval --out quality.json"


def test_the_readme_tells_what_clips_gain_as_the_table_does():
    told = re.search(r"\[\+([\d.]+) dB for rain, \+([\d.]+) for snow\]", text_of(ROOT / "README.md")).groups()
    clips = text_of(ROOT / "docs/research.md").split("<!-- made: clips -->")[1].split("<!-- end -->")[0]
    gains = dict(re.findall(r"^\| (\w+) \|.*\| \+([\d.]+) \[", clips, re.MULTILINE))
    assert told == tuple(f"{float(gains[task]):.1f}" for task in ("rain", "snow"))


@pytest.mark.parametrize("backbone", ["mini", "mini-audio"])
def test_a_prompts_command_on_the_card_has_the_settings_that_its_file_tells(backbone):
    text = text_of(ASSETS / backbone / "MODEL_CARD.md").replace("\\\n", "")
    commands = {name: (task, words) for task, words, name in re.findall(COMMAND, text, re.MULTILINE)}
    folder = ASSETS / backbone / "prompts"
    fine = [f"fine/{task}" for task in spec(backbone).tasks if (folder / f"fine/{task}.safetensors").exists()]
    assert list(commands) == [*spec(backbone).tasks, *fine]
    for name, (task, words) in commands.items():
        given = read_assignments(re.findall(r"-s (\S+)", words))
        config = resolve({"task": task, "backbone": backbone} | given)
        learned = load_prompt(folder / f"{name}.safetensors").training
        names = [name for name in learned if name in SETTINGS and name not in FREE - {"iterations"} and name not in PLACES]
        assert {name: getattr(config, name) for name in names} == {
            name: tuple(learned[name]) if isinstance(learned[name], list) else learned[name] for name in names
        }


def test_every_command_of_the_help_stands_in_the_reference_and_no_other(maker):
    shown = subprocess.run(
        [sys.executable, "-c", "from ebr_engine.cli import main; main()", "--help"], capture_output=True, text=True, check=True
    ).stdout
    reference = text_of(ROOT / "docs" / "reference.md")
    sections = re.findall(r"^### ebr-engine (.+)$", reference, re.MULTILINE)
    assert {words.split()[0] for words in sections} == set(COMMANDS)
    assert all(re.search(rf"\b{name}\b", shown) for name in COMMANDS)
    assert sections == list(maker.commands())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"\w+://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(text_of(file)), target


def test_links_to_headings_are_checked():
    assert anchors_of("## What `--task auto` sees\n```sh\n# no heading\n```\n") == {"what---task-auto-sees"}


def test_every_variable_of_ours_stands_in_the_reference():
    used = {name for path in CODE for name in re.findall(r"\bEBR_[A-Z_]+\b", text_of(path))}
    told = set(re.findall(r"`(EBR_[A-Z_]+)`", text_of(ROOT / "docs" / "reference.md")))
    assert used
    assert used <= told <= used | {"EBR_GOLDEN_DIR"}  # the tests' own


def test_every_extra_stands_in_the_reference():
    project = text_of(ROOT / "pyproject.toml").split("[project.optional-dependencies]")[1].split("\n[")[0]
    table = text_of(ROOT / "docs" / "reference.md").split("## Extras")[1].split("\n## ")[0]
    assert set(re.findall(r"^(\w+) = \[", project, re.MULTILINE)) == set(re.findall(r"`(\w+)`", table)) - {"pip"}


def test_what_is_required_is_pinned_to_what_is_tested():
    project = text_of(ROOT / "pyproject.toml")
    needed = project.split("dependencies = [")[1].split("]\n\n")[0]
    extras = re.search(r"^models = \[(.*)\]$", project, re.MULTILINE)[1]
    names = {name.lower() for name in re.findall(r'"([\w-]+)', needed.split("\n]")[0] + extras)} - {"tomli"}
    pinned = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", text_of(ROOT / "constraints.txt"), re.M)}
    assert names - pinned == set()
    assert '"torch>=2.9"' in needed
