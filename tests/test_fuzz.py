"""Readers of files that come from elsewhere: whatever the bytes are, a result, or the project's own error in one line."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebr_engine.errors import EbrError
from ebr_engine.export.engine_file import load_engine, read_about
from ebr_engine.jobs.files import Job
from ebr_engine.jobs.journal import NAME, Journal
from ebr_engine.jobs.manifest import read_manifest
from ebr_engine.prompts.prompt import Prompt, load_prompt

few = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def told_in_one_line(read, path, content):
    path.write_bytes(content)
    try:
        return read(path)
    except EbrError as error:
        line = str(error)
    assert "\n" not in line
    assert str(path) in line
    return None


def mutated(valid):
    """Valid bytes with some replaced, cut out or put in, in the header for the most part."""
    place = st.one_of(st.integers(0, min(400, len(valid) - 1)), st.integers(0, len(valid) - 1))
    change = st.tuples(st.sampled_from(["set", "cut", "put", "end"]), place, st.binary(min_size=1, max_size=6))

    def apply(changes):
        content = bytearray(valid)
        for kind, at, data in changes:
            at = min(at, len(content))
            if kind == "end":
                del content[max(at, 1) :]
            else:
                content[at : at + (0 if kind == "put" else len(data))] = b"" if kind == "cut" else data
        return bytes(content)

    return st.lists(change, min_size=1, max_size=4).map(apply)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of a valid file of each kind."""
    from ebr_engine.engine.restorer import Restorer

    folder = tmp_path_factory.mktemp("valid")
    Prompt(torch.ones(3, 4), torch.ones(2), "mini", task="haze", t0=0.1).save(folder / "p.safetensors")
    released = {"backend": "wan", "deep_prompt_bank": {"prompts": torch.ones(1, 2, 4)}, "alphas": [torch.tensor(1.0)] * 2}
    torch.save(released, folder / "wan_rain.pt")
    restorer = Restorer("mini", device="cpu", precision="fp32")
    restorer.build(folder / "e.ebr", restorer.plan("haze", steps=1))
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@few
@given(data=st.data())
def test_prompts(tmp_path, valid, suffix, data):
    content = data.draw(st.one_of(st.binary(max_size=300), mutated(valid[suffix])))
    prompt = told_in_one_line(load_prompt, tmp_path / f"wan_x{suffix}", content)
    assert prompt is None or isinstance(prompt, Prompt)


@settings(few, max_examples=15)
@given(data=st.data())
def test_engine_files(tmp_path, valid, data):
    content = data.draw(st.one_of(st.binary(max_size=300), mutated(valid[".ebr"])))
    told_in_one_line(read_about, tmp_path / "x.ebr", content)
    told_in_one_line(lambda path: load_engine(path, torch.device("cpu")), tmp_path / "x.ebr", content)


@few
@given(
    values=st.dictionaries(
        st.sampled_from(["config", "codec", "about", "t0", "graph", "backbone", "version"]), st.text(max_size=20)
    )
)
def test_engine_files_that_say_nonsense_of_themselves(tmp_path, values):
    from safetensors.torch import save

    from ebr_engine.export.engine_file import FORMAT, digest

    tensors = {"steps.times": torch.tensor([0.1, 0.0]), "steps.coefficients": torch.zeros(1, 4), "tables.0.head": torch.ones(1)}
    metadata = {"format": FORMAT, "backbone": "mini", "config": "{}", "codec": "{}", "about": "{}", "t0": "0.1", "identity": ""}
    metadata |= values
    metadata["digest"] = digest(tensors, metadata)
    content = save(tensors, metadata)
    told_in_one_line(read_about, tmp_path / "x.ebr", content)
    told_in_one_line(lambda path: load_engine(path, torch.device("cpu")), tmp_path / "x.ebr", content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)
ROW = st.dictionaries(st.sampled_from(["input", "output", "task", "x"]), JSON)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@few
@given(data=st.data())
def test_manifests(tmp_path, suffix, data):
    csv, lines = b'input,output,task\na.png,"b, c.png",haze\n\nd.png,,\n', b'{"input": "a.png", "task": "haze"}\n{"input": "b"}\n'
    rows = st.lists(JSON | ROW, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    content = data.draw(
        st.one_of(st.binary(max_size=200), mutated(csv), mutated(lines), rows, st.text().map(lambda x: x.encode()))
    )
    for row in told_in_one_line(read_manifest, tmp_path / f"x{suffix}", content) or []:
        assert row.input
        os.fsencode(row.input)


@few
@given(data=st.data())
def test_journals(tmp_path, data):
    entry = {"output": "a.png", "size": 3, "time": 5, "source": "a", "source_size": 1, "source_time": 2, "settings": "s"}
    line = json.dumps(entry).encode() + b"\n"
    objects = st.fixed_dictionaries({name: st.just(value) | JSON for name, value in entry.items()}).map(
        lambda x: json.dumps(x).encode()
    )
    content = data.draw(st.one_of(st.binary(max_size=200), mutated(line * 2), objects))
    (tmp_path / NAME).write_bytes(content)
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "a.png").write_bytes(b"123")
    job = Job(tmp_path / "a", tmp_path / "a.png")
    assert not Journal(tmp_path).finished(job, "s")  # no time fits
    rename = Journal(tmp_path).commit(job, "s")
    (tmp_path / "part").write_bytes(b"1234")
    rename(tmp_path / "part", job.target)
    assert Journal(tmp_path).finished(job, "s")  # whatever stood before


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("wrap", [pickle.dumps, lambda bomb: _saved({"backend": "wan", "deep_prompt_bank": bomb, "alphas": []})])
@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.safetensors", "x.ebr"])
def test_nothing_is_ever_unpickled(tmp_path, monkeypatch, wrap, name):
    monkeypatch.chdir(tmp_path)
    content = wrap(Bomb())
    read = read_about if name == "x.ebr" else load_prompt
    assert told_in_one_line(read, tmp_path / name, content) is None
    assert not Path("exploded").exists()


def _saved(content):
    import io

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
