"""Inputs and outputs in a bucket, of a real S3 server on this machine: what is there is whole, and made once."""

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import fsspec
from moto.server import ThreadedMotoServer

from ebr_engine.cli import app
from ebr_engine.jobs import remote
from ebr_engine.media.images import write_image
from ebr_engine.media.picture import Picture
from tests.tiny import make_prompt, picture

HOW = ["--device", "cpu", "--precision", "fp32", "--compile", "off"]


@pytest.fixture(scope="module")
def server():
    """The server's address."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """A file system with an empty bucket `bkt`, which commands find by the usual variables."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server,
        "EBR_CACHE_DIR": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    if fs.exists("bkt"):
        fs.rm("bkt", recursive=True)
    fs.mkdir("bkt")
    return fs


@pytest.fixture(scope="module")
def model(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("prompt") / "p.safetensors"
    make_prompt().save(path)
    return ["--model", str(weights), "--prompt", str(path)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with two pictures, one of them deeper and under an odd name, and a text."""
    folder = tmp_path_factory.mktemp("photos") / "in"
    (folder / "deep").mkdir(parents=True)
    for index, name in enumerate(("a.png", "deep/ü b.png")):
        write_image(folder / name, Picture(picture(24 + 7 * index, 40, seed=index)[0].permute(1, 2, 0).numpy()))
    (folder / "notes.txt").write_text("no picture")
    return folder


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="ebr-engine")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def told(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def made(fs, folder="bkt/out"):
    return {path.removeprefix(f"{folder}/"): fs.cat_file(path) for path in fs.find(folder) if remote.JOURNAL not in path}


@pytest.fixture(scope="module")
def alone(photos, model, tmp_path_factory):
    """What the same command makes of the folder on this machine."""
    out = tmp_path_factory.mktemp("alone")
    assert run("restore", photos, "-o", out, *model, *HOW).exit_code == 0
    return {name: (out / name).read_bytes() for name in ("a.png", "deep/ü b.png")}


def test_a_folder_in_a_bucket_becomes_another_and_is_resumed(bucket, photos, model, alone, tmp_path):
    bucket.put(str(photos), "bkt/in", recursive=True)
    words = ["restore", "s3://bkt/in/", "-o", "s3://bkt/out", *model, *HOW, "--json", "--quiet"]
    first = run(*words)
    assert (first.exit_code, first.stderr) == (0, "")
    assert made(bucket) == alone
    lines = told(first)
    assert {(each["input"], each.get("output")) for each in lines[:-1]} == {
        ("s3://bkt/in/a.png", "s3://bkt/out/a.png"),
        ("s3://bkt/in/deep/ü b.png", "s3://bkt/out/deep/ü b.png"),
        ("s3://bkt/in/notes.txt", None),
    }
    assert not list((tmp_path / "cache").rglob("*.png"))  # nothing is left here

    bucket.rm("bkt/out/a.png")
    second = told(run(*words))
    assert [each["input"] for each in second[:-1] if each["status"] == "done"] == ["s3://bkt/in/a.png"]
    assert second[-1]["summary"]["skipped"] == 1
    assert made(bucket) == alone

    changed = run(*words, "--seed", "7")
    assert changed.exit_code == 2
    assert "s3://bkt/out/a.png: exists, made with other settings" in changed.stderr
    assert made(bucket) == alone
    assert run(*words, "--seed", "7", "--overwrite").exit_code == 0
    assert made(bucket)["a.png"] != alone["a.png"]


def test_a_run_that_ends_before_an_object_is_put_makes_it_again(bucket, photos, model, alone, monkeypatch):
    words = ["restore", photos, "-o", "s3://bkt/out", *model, *HOW]
    put = remote.Place.put

    def fail(self, path):
        if self.path.endswith("a.png"):
            raise OSError(5, "the line is down", self.address)
        put(self, path)

    with monkeypatch.context() as broken:
        broken.setattr(remote.Place, "put", fail)
        result = run(*words)
    assert (result.exit_code, "s3://bkt/out/a.png: the line is down" in result.stderr) == (1, True)
    assert list(made(bucket)) == ["deep/ü b.png"]
    assert run(*words).exit_code == 0
    assert made(bucket) == alone


def test_one_object_a_pattern_and_a_path_of_this_machine(bucket, photos, model, alone, tmp_path):
    bucket.put(str(photos), "bkt/in", recursive=True)
    assert run("restore", "s3://bkt/in/a.png", "-o", "s3://bkt/one/clear.png", *model, *HOW).exit_code == 0
    assert made(bucket, "bkt/one") == {"clear.png": alone["a.png"]}
    assert run("restore", "s3://bkt/in/**/*.png", "-o", tmp_path / "here", *model, *HOW, "--compare").exit_code == 0
    assert (tmp_path / "here" / "deep" / "ü b.png").read_bytes() == alone["deep/ü b.png"]
    assert (tmp_path / "here" / "a_compare.png").exists()
    assert run("restore", f"file://{photos}/a.png", "-o", f"file://{tmp_path}/f/", *model, *HOW).exit_code == 0
    assert (tmp_path / "f" / "a.png").read_bytes() == alone["a.png"]


def test_a_manifest_in_a_bucket_names_inputs_beside_it(bucket, photos, model, alone):
    bucket.put(str(photos), "bkt/in", recursive=True)
    bucket.pipe_file("bkt/list.csv", b"input,output,seed\nin/a.png,x/first.png,\ns3://bkt/in/a.png,second.png,7\n")
    assert run("restore", "--manifest", "s3://bkt/list.csv", "-o", "s3://bkt/out", *model, *HOW).exit_code == 0
    found = made(bucket)
    assert sorted(found) == ["second.png", "x/first.png"]
    assert found["x/first.png"] == alone["a.png"] != found["second.png"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["s3://bkt/nothing/", "-o", "s3://bkt/out"], "s3://bkt/nothing: no such file or folder"),
        (["s3://nobucket/x.png", "-o", "s3://bkt/out"], "s3://nobucket/x.png"),
        (["s3://bkt/in/a.png", "-o", "s3://bkt/in/"], "s3://bkt/in/a.png: is an input"),
        (["what://bkt/in/a.png", "-o", "s3://bkt/out"], "what://bkt/in/a.png"),
        (["s3://bkt/in/", "-o", "s3://bkt/%06d.png"], "frames that are one clip"),
        (["s3://bkt/in/", "-o", "s3://bkt/out", "--preview"], "--preview"),
    ],
)
def test_what_cannot_be_is_one_line(bucket, photos, model, words, line):
    bucket.put(str(photos), "bkt/in", recursive=True)
    result = run("restore", *words, *model, *HOW)
    assert result.exit_code == 2
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
    assert not bucket.exists("bkt/out")
