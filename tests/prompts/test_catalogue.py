"""What a task's name leads to: the user's prompt, then the bundled one, else a way to get one."""

import subprocess
import sys

import pytest
import torch

from ebr_engine.errors import PromptError
from ebr_engine.prompts import catalogue
from ebr_engine.prompts.prompt import Prompt


@pytest.fixture(autouse=True)
def installed(monkeypatch, tmp_path):
    monkeypatch.setenv("EBR_PROMPT_DIR", str(tmp_path))
    return tmp_path


def install(backbone, task):
    file = catalogue.installed_file(backbone, task)
    Prompt(torch.ones(2, 3), torch.ones(4), backbone).save(file)
    return file


def test_every_task_is_bundled_for_mini_and_none_for_the_others():
    assert set(catalogue.prompt_files("mini")) == set(catalogue.TASKS)
    assert catalogue.prompt_files("wan") == catalogue.prompt_files("flux") == {}


def test_what_the_user_installed_is_found_under_its_backbone_only(installed):
    file = install("wan", "rain")
    assert file == installed / "wan" / "rain.safetensors"
    assert catalogue.find_prompt("wan", "rain") == file
    with pytest.raises(PromptError):
        catalogue.find_prompt("flux", "rain")


def test_what_the_user_installed_goes_before_what_is_bundled():
    bundled = catalogue.find_prompt("mini", "haze")
    assert bundled.is_relative_to(catalogue.ASSETS)
    file = install("mini", "haze")
    assert catalogue.find_prompt("mini", "haze") == file != bundled


@pytest.mark.parametrize("backbone", ["wan", "flux"])
def test_a_missing_prompt_of_a_real_backbone_names_where_to_get_it_and_how_to_add_it(backbone):
    install(backbone, "snow")
    with pytest.raises(PromptError) as error:
        catalogue.find_prompt(backbone, "rain")
    for word in (
        f"'rain': {backbone} has no prompt for it",
        "there is: snow",
        "github.com/sudraj2002/YPT",
        "ckpts",
        "ebr-engine prompts add FILE.pt --task rain",
    ):
        assert word in str(error.value)


def test_a_missing_prompt_of_mini_names_the_tasks_there_are():
    with pytest.raises(PromptError, match=r"'fog': mini has no prompt for it; there is: blur, haze, lowlight, rain, snow$"):
        catalogue.find_prompt("mini", "fog")


def test_it_imports_nothing_heavy():
    script = "import sys, ebr_engine.prompts.catalogue; print([n for n in ('torch', 'numpy', 'safetensors') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60).stdout == "[]\n"


def test_several_tasks_are_found_with_their_weights():
    files = catalogue.prompt_files("mini")
    assert catalogue.find_prompts("mini", "rain") == [(files["rain"], 1.0)]
    assert catalogue.find_prompts("mini", "rain+haze") == [(files["rain"], 1.0), (files["haze"], 1.0)]
    assert catalogue.find_prompts("mini", "rain:0.7 + haze:3e-1") == [(files["rain"], 0.7), (files["haze"], 0.3)]


def test_an_installed_prompt_may_be_called_anything():
    file = install("mini", "rain+haze")
    assert catalogue.find_prompts("mini", "rain+haze") == [(file, 1.0)]


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("haze+fog", "unknown task 'fog'"),
        ("haze+", "unknown task ''"),
        ("haze:much", "haze:much"),
        ("haze:", "haze:"),
        ("auto", "each file"),
        ("haze:nan+rain", "haze:nan"),
        ("haze+rain+haze:2", "twice"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(tasks, words):
    with pytest.raises(PromptError, match=words):
        catalogue.find_prompts("mini", tasks)
