"""What numbers were made with is told as data, and equal things have equal digests."""

import hashlib
import json
import shutil
from importlib.metadata import version

import numpy as np

from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation import provenance
from ebr_engine.evaluation.paired import pair_folders
from ebr_engine.evaluation.run import Restoring
from ebr_engine.media.images import write_image
from ebr_engine.prompts.catalogue import find_prompt, fine_file
from ebr_engine.request import RestoreRequest


def test_the_machine_and_the_program_are_told():
    found = provenance.provenance("cpu")
    assert (found["device"], found["versions"]["torch"]) == ("cpu", version("torch"))
    assert found["processor"]
    assert json.loads(json.dumps(found)) == found


def test_a_commit_says_whether_files_differ_from_it(monkeypatch):
    answers = {"status": "", "rev-parse": "abc\n"}
    monkeypatch.setattr(provenance.subprocess, "run", lambda command, **_: type("", (), {"stdout": answers[command[3]]}))
    monkeypatch.setattr(provenance.Path, "exists", lambda path: True)
    assert provenance.commit.__wrapped__() == "abc"
    answers["status"] = " M README.md\n"
    assert provenance.commit.__wrapped__() == "abc modified"


def test_a_file_of_the_hubs_store_is_known_by_its_name(tmp_path):
    digest = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("0" * 64)).write_bytes(b"not read")
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "blobs" / ("0" * 64))
    (tmp_path / "y.safetensors").write_bytes(b"weights")
    assert provenance.file_hash(tmp_path / "x.safetensors") == "0" * 64
    assert provenance.file_hash(tmp_path / "y.safetensors") == digest


def test_equal_data_has_one_digest_wherever_it_lies(tmp_path):
    for role in ("in", "gt"):
        (tmp_path / "a" / role).mkdir(parents=True)
        write_image(tmp_path / "a" / role / "x.png", np.full((8, 8, 3), 0.3 if role == "in" else 0.6, np.float32))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    facts = [provenance.data_facts(pair_folders(tmp_path / side / "in", tmp_path / side / "gt", None)) for side in ("a", "b")]
    assert facts[0] == facts[1]
    write_image(tmp_path / "b" / "gt" / "x.png", np.zeros((8, 8, 3), np.float32))
    assert provenance.data_facts(pair_folders(tmp_path / "b" / "in", tmp_path / "b" / "gt", None)) != facts[0]


def test_a_restoration_is_told_by_its_numbers():
    restoring = Restoring(RestoreRequest(task="rain+haze", strength=0.5, precision="fp32"), (1, 2))
    found = provenance.restoration_facts(restoring, "cpu")
    plan = restoring.load("cpu")[1]
    assert [(run["t0"], tuple(run["times"])) for run in found["schedule"]["runs"]] == [
        (stage.table.t0, stage.table.times) for stage in plan.stages
    ]
    rain, haze = (find_prompt("mini", task) for task in ("rain", "haze"))
    files = [file for task in (rain, haze) for file in (task, fine_file(task))]  # either of a task's, by the picture's size
    assert [prompt["sha256"] for prompt in found["prompts"]] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert [prompt["supersample"] for prompt in found["prompts"]] == [1, 2, 1, 2]
    assert (found["mix"], found["seeds"], found["strength"], found["dtype"]) == ("turn", [1, 2], 0.5, "float32")
    assert found["weights"]["source"] == "bundled"
    assert json.loads(json.dumps(found)) == found


def test_an_engine_file_is_told_by_its_hash(tmp_path):
    restorer = Restorer(device="cpu", precision="fp32")
    restorer.build(tmp_path / "haze.ebr", restorer.plan("haze", steps=1), {"task": "haze"})
    found = provenance.restoration_facts(Restoring(RestoreRequest(engine=tmp_path / "haze.ebr")), "cpu")
    assert found["engine"]["sha256"] == hashlib.sha256((tmp_path / "haze.ebr").read_bytes()).hexdigest()
    assert found["engine"]["task"] == "haze"
