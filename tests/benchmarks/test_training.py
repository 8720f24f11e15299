"""A step of learning is the same step in every form, and what it takes on paper is what autograd keeps."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks import report, training, training_beside
from benchmarks.memory import learning_memory
from benchmarks.roofline import workload

NAMES = ["mini", "wan-crops"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Text and numbers of the quick form."""
    file = tmp_path_factory.mktemp("training") / "training.json"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(map(str, parts))))
        training.main(["--quick", "--case", *NAMES, "--precision", "fp32", "--json", str(file)])
    return SimpleNamespace(text="\n".join(lines), result=json.loads(file.read_text()))


def test_every_form_learns_the_same(quick):
    assert [case["case"] for case in quick.result["cases"]] == NAMES
    for case in quick.result["cases"]:
        names = [form["form"] for form in case["forms"]]
        assert names == ["forward", "step", "step, checkpointed blocks", "diffusers, weights frozen", "diffusers, as loaded"]
        losses = [form["loss"] for form in case["forms"]]
        assert max(losses) < min(losses) * (1 + 1e-5)
        for form in case["forms"][1:]:
            assert form["gradient_difference"] < 1e-4, (case["case"], form["form"])
        assert all(name in quick.text for name in names)


def test_ratios_are_of_the_medians_and_goals_are_judged_by_them(quick):
    for case in quick.result["cases"]:
        medians = {form["form"]: form["seconds"]["median"] for form in case["forms"]}
        for form in case["forms"]:
            assert form["x forward"] == pytest.approx(medians[form["form"]] / medians["forward"])
            assert form["x faster"] == pytest.approx(medians["diffusers, weights frozen"] / medians[form["form"]])
    forms = [
        {
            "form": name,
            "seconds": {"median": 1, "quartiles": [1, 1]},
            "x forward": 2.6,
            "x faster": 1.6,
            "loss": 1,
            "gradient_difference": 0,
        }
        for name in ("forward", "step")
    ]
    shown = training.case_table({"case": "mini", "latent": [1], "dtype": "float32", "forms": forms})
    assert "(missed)" in shown
    assert "(met: 1.60)" in shown


@pytest.mark.parametrize("name", ["wan-1.3b", "flux-dev"])
def test_memory_grows_with_blocks_and_batch_and_checkpointing_spares_it(name):
    work = workload(name)
    few = {"num_layers": 2, "num_attention_heads": 2} | ({"num_single_layers": 1} if name == "flux-dev" else {"ffn_dim": 512})
    work = replace(work, config=replace(work.config, **few))
    one, two = learning_memory(work), learning_memory(work, batch=2)
    # a block keeps its joined q, k and v at least, and not more than thirty streams
    stream = 2 * (work.tokens + (work.text if name == "flux-dev" else 0)) * work.config.width
    assert 4 * stream < one.block < 30 * stream
    assert 1.1 * one.block < one.blocks <= 3 * one.block
    assert two.blocks == pytest.approx(2 * one.blocks, rel=0.1)  # a prompt's rows do not grow
    assert two.weights == one.weights
    assert one.checkpointed < one.kept


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--case", "sora"], ["--precision", "int4"]])
def test_bad_usage_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        training.main(arguments)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_step_beside_another_commits_is_told():
    def form(name, seconds):
        return {
            "form": name,
            "seconds": report.spread([seconds]),
            "x faster": 3 / seconds,
            "loss": 1.0,
            "gradient_difference": 0.01,
        }

    given = {"beside": "abc", "precision": "bf16", "crops": 4, "side": 128, "rounds": 1, "fastest form": 1.5}
    text = training.table(given | {"forms": [form("before", 3.0), form("now", 2.0)]})
    assert "beside abc" in text
    assert text.splitlines()[-3].split()[:5] == ["now", "2000", "2000", "2000", "1.50"]
    assert text.endswith("x1.50")


@pytest.mark.slow
def test_two_folders_steps_have_the_same_gradients(tmp_path):
    file = tmp_path / "x"
    training.main(["--quick", "--precision", "fp32", "--beside", str(report.ROOT), "--json", str(file)])
    before, now = json.loads(file.read_text())["forms"]
    assert now["gradient_difference"] < 1e-5
    assert now["loss"] == pytest.approx(before["loss"])
    assert training_beside.revision(report.ROOT)


def test_a_folder_without_benchmarks_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        training.main(["--beside", str(tmp_path)])
    assert "there is no benchmarks in it" in capsys.readouterr().err
