"""Two nodes of Ray on one machine restore what one process would, to the byte, while workers and nodes die."""

import json
import os
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("av")
pytest.importorskip("ray")

import ray

from ebr_engine.cli import app
from ebr_engine.cluster.connect import Share
from ebr_engine.cluster.fleet import Fleet
from ebr_engine.cluster.pool import Pool, Stopped
from ebr_engine.cluster.run import FleetRun
from ebr_engine.errors import EbrError
from ebr_engine.jobs.journal import NAME
from ebr_engine.jobs.progress import Progress
from ebr_engine.jobs.recipe import Recipes
from ebr_engine.jobs.run import run_work
from ebr_engine.jobs.work import find_work
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from ebr_engine.media.video import VideoInfo, write_video
from ebr_engine.request import RestoreRequest
from tests.cluster.stand_in import StandIn, unable
from tests.tiny import make_prompt, picture

HOW = "--device cpu --precision fp32 --compile off --chunk-frames 3 --chunk-overlap 1 --codec ffv1"


@pytest.fixture(scope="module")
def nodes():
    """A cluster whose head computes nothing and whose two other nodes have a core each; this process is its driver."""
    from ray.cluster_utils import Cluster

    own = {"_system_config": {"worker_niceness": 0}}  # not 15, which waits for all else that a machine has to do
    for attempt in range(3):  # Ray gives a node 30 s to start, which a busy machine may not keep to
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, include_dashboard=False, **own)
            made = [cluster.add_node(num_cpus=1) for _ in range(2)]
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            break
        except Exception:
            ray.shutdown()
            cluster.shutdown()
            if attempt == 2:
                raise
    yield cluster, made
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory, weights):
    """Options that name a tiny model and its prompt."""
    path = tmp_path_factory.mktemp("prompt") / "p.safetensors"
    make_prompt().save(path)
    return {"model": weights, "prompt": path}


def pixels(height=24, width=40, seed=0):
    return picture(height, width, seed=seed)[0].permute(1, 2, 0).numpy()


def fill(folder, pictures=4, frames=8):
    """Pictures of several sizes, a clip with a cut in it, and a picture that is cut short."""
    folder.mkdir()
    for index in range(pictures):
        write_image(folder / f"{index}.png", Picture(pixels(24 + 7 * index, seed=index)))
    if frames:
        with write_video(folder / "c.mkv", VideoInfo(40, 24, Fraction(10), Fraction(1, 10)), codec="ffv1") as writer:
            for index in range(frames):
                writer.write(pixels(seed=index // 5) + np.float32(0.01 * index))
        whole = (folder / "0.png").read_bytes()
        (folder / "damaged.png").write_bytes(whole[: len(whole) // 2])
    return folder


def restore(folder, out, model, *more):
    words = ["restore", folder, "-o", out, "--model", model["model"], "--prompt", model["prompt"], *HOW.split(), *more]
    return run(*words)


def errors(result):
    """What went wrong, without what a slow machine is told meanwhile."""
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def lines(out):
    return [json.loads(line) for line in (out / NAME).read_text().splitlines()]


def test_a_folder_becomes_what_one_process_makes_of_it_and_is_resumed(nodes, model, tmp_path):
    folder = fill(tmp_path / "in")
    alone = restore(folder, tmp_path / "alone", model, "--compare")
    result = restore(folder, tmp_path / "many", model, "--compare", "--cluster", "auto", "--json")
    assert (alone.exit_code, result.exit_code) == (1, 1)  # the damaged one
    assert errors(alone) == errors(result)
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert told[-1]["summary"] == {"done": 5, "failed": 1, "skipped": 0, "not_tried": 0}
    assert {each["output"] for each in told[:-1] if each["status"] == "done"} == {
        str(tmp_path / "many" / name) for name in ("0.png", "1.png", "2.png", "3.png", "c.mkv")
    }
    made = sorted(path.name for path in (tmp_path / "many").iterdir() if path.suffix in (".png", ".mkv"))
    assert len(made) == 10
    for name in made:
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    written = [line["output"] for line in lines(tmp_path / "many")]
    assert sorted(written) == made  # each once
    (tmp_path / "many" / "1.png").unlink()
    again = restore(folder, tmp_path / "many", model, "--compare", "--cluster", "auto", "--json")
    assert {json.loads(line).get("input") for line in again.stdout.splitlines()[:-1]} == {
        str(folder / name) for name in ("damaged.png", "1.png")
    }
    assert (tmp_path / "many" / "1.png").read_bytes() == (tmp_path / "alone" / "1.png").read_bytes()


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="ebr-engine")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def pairs(folder):
    """Two pairs, of which one is cut short."""
    for name, seed in (("input", 0), ("target", 9)):
        (folder / name).mkdir(parents=True)
        for index in range(2):
            write_image(folder / name / f"{index}.png", Picture(pixels(32, 40, seed=seed + index)))
    whole = (folder / "input" / "1.png").read_bytes()
    (folder / "input" / "1.png").write_bytes(whole[: len(whole) // 2])
    return folder


def test_files_are_measured_as_one_process_measures_them(nodes, model, tmp_path):
    folder = pairs(tmp_path / "pairs")
    words = ["eval", "--input", folder / "input", "--target", folder / "target", "--no-empty", "--device", "cpu"]
    words += ["--precision", "fp32", "--model", model["model"], "--prompt", model["prompt"], "--out"]
    alone, many = run(*words, tmp_path / "alone"), run(*words, tmp_path / "many", "--cluster", "auto")
    assert (alone.exit_code, many.exit_code) == (1, 1)
    assert errors(many) == errors(alone)  # the damaged one, by its own path
    scores = [(tmp_path / name / "scores.csv").read_text() for name in ("alone", "many")]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_latents_are_encoded_to_the_same_files(nodes, model, tmp_path):
    folder = pairs(tmp_path / "pairs")
    words = ["cache-latents", "--data", folder, "--model", model["model"], "--size", "24", "--views", "2", "--device", "cpu"]
    words += ["--set", "bad_data=skip", "-o"]
    assert run(*words, tmp_path / "alone").exit_code == 0
    result = run(*words, tmp_path / "many", "--cluster", "auto")
    assert (result.exit_code, "2 made, 0 there, 1 pair(s) skipped" in result.stdout) == (0, True)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")} for name in ("alone", "many")]
    assert len(files[0]) == 2
    assert files[0] == files[1]
    assert "0 made, 2 there" in run(*words, tmp_path / "many", "--cluster", "auto").stdout


def test_a_fleet_takes_what_lies_behind_addresses(nodes, model, tmp_path, monkeypatch):
    monkeypatch.setenv("EBR_CACHE_DIR", str(tmp_path / "cache"))
    folder = fill(tmp_path / "in", pictures=2)
    alone = restore(folder, tmp_path / "alone", model)
    many = restore(f"file://{folder}", f"file://{tmp_path}/many", model, "--cluster", "auto")
    assert (alone.exit_code, many.exit_code) == (1, 1)
    assert len(errors(alone)) == 1
    assert [line.replace("file://", "") for line in errors(many)] == errors(alone)
    for name in ("0.png", "1.png", "c.mkv"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.fixture
def pool(nodes, tmp_path):
    with Pool(StandIn, (tmp_path,), Share(), slow=2.0) as made:
        yield made


@pytest.mark.slow
def test_a_dead_workers_unit_goes_to_another_but_not_for_ever(pool, tmp_path):
    assert pool.submit("die", "once", 1).result(60) == 3
    with pytest.raises(EbrError, match="3 workers died over it"):
        pool.submit("die", "always", 99).result(60)
    assert (tmp_path / "always").stat().st_size == 3
    assert pool.submit("double", 4).result(60) == 8


def test_a_methods_own_error_is_raised_as_it_is_and_not_tried_again(pool, tmp_path):
    with pytest.raises(EbrError, match=r"^no such thing$"):
        pool.submit("refuse", "no such thing").result(60)
    assert (tmp_path / "refused").stat().st_size == 1


def test_a_slow_unit_is_started_again_and_the_first_result_counts(pool):
    assert [future.result(60) for future in [pool.submit("slow_once", 0) for _ in range(1)]] == ["first"]
    quick = [pool.submit("slow_once", 0).result(60) for _ in range(3)]
    assert quick == ["second"] * 3
    (Path(pool._arguments[0]) / "slow").unlink()
    begun = time.monotonic()
    assert pool.submit("slow_once", 30).result(60) == "second"
    assert time.monotonic() - begun < 15


def test_what_is_waited_for_ends_with_the_pool(nodes, tmp_path):
    with Pool(StandIn, (tmp_path,), Share()) as pool:
        pool.submit("double", 1).result(60)
        futures = [pool.submit("double", 1, 30) for _ in range(5)]
    for future in (*futures, pool.submit("double", 1)):
        with pytest.raises(Stopped):
            future.result(0)


def test_a_model_that_no_worker_can_load_is_told(nodes, tmp_path):
    with Pool(unable, (tmp_path,), Share()) as pool, pytest.raises(EbrError, match=r"^this model is not here$"):
        pool.submit("who").result(60)


def test_a_cluster_without_room_is_told(nodes, tmp_path):
    with pytest.raises(EbrError, match="no node with 8 core"):
        Pool(StandIn, (tmp_path,), Share(cores=8))


def test_workers_of_a_node_are_counted_node_by_node():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    assert [Share(2).fit(nodes), Share(5).fit(nodes), Share(1, 1).fit(nodes)] == [3, 0, 2]


class Killer(Progress):
    """Ends a node when the first file is finished."""

    def __init__(self, kill):
        self.kill, self.finished = kill, []

    def finish(self, outcome):
        assert not outcome.error
        if not self.finished:
            self.kill()
        self.finished.append(outcome.job.source.name)


@pytest.mark.slow
def test_a_node_that_dies_in_the_middle_costs_nothing_but_time(nodes, model, tmp_path):  # the last one: it leaves one node
    cluster, made = nodes
    folder = fill(tmp_path / "in", pictures=12, frames=0)
    assert restore(folder, tmp_path / "alone", model).exit_code == 0
    request = RestoreRequest(
        model=model["model"], prompt=((model["prompt"], 1.0),), device="cpu", precision="fp32", compile="off", codec="ffv1"
    )
    out = tmp_path / "many"
    work = find_work([folder], str(out), request)
    killer = Killer(lambda: cluster.remove_node(made[0], allow_graceful=False))
    with work.locked(), Fleet(request, work.digests, work.jobs, Share()) as fleet:
        until = time.monotonic() + 60
        while fleet.pool.ready < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert fleet.pool.ready == 2
        assert fleet.memory > 100e6  # stated to Ray
        assert run_work(fleet, work, killer, Recipes(fleet, work.digests), kind=FleetRun) == 0
    assert sorted(killer.finished) == sorted(os.listdir(folder))
    assert sorted(line["output"] for line in lines(out)) == sorted(os.listdir(folder))
    for name in os.listdir(folder):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert read_image(out / "3.png").height == 24 + 7 * 3
