"""Our own endpoints: what is accepted is restored, told of, cancelled, forgotten, and survives a restart."""

import json

import pytest
import torch

from ebr_engine.engine.restorer import Restorer
from ebr_engine.media.images import read_image
from tests.media.clip_maker import write_clip
from tests.serve.conftest import StandIn, client, over, png, post, process, until
from tests.tiny import make_prompt, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A real restorer of the tiny backbone, and the folder that holds its prompt of haze."""
    folder = tmp_path_factory.mktemp("tiny")
    make_prompt().save(folder / "prompts" / "mini" / "haze.safetensors")
    torch.manual_seed(0)
    return Restorer("mini", model=save_tiny(folder / "tiny.safetensors"), compile="off"), folder / "prompts"


def test_a_restored_file_is_what_the_command_writes(tiny, tmp_path, monkeypatch):
    restorer, prompts = tiny
    monkeypatch.setenv("EBR_PROMPT_DIR", str(prompts))
    source = png(tmp_path / "deep.png", bits=16, alpha=True)
    restorer.restore_file(source, tmp_path / "straight.png", task="haze", steps=1, seed=3)
    with client(tmp_path / "store", restorer) as inside:
        answer = post(inside, source, request='{"task": "haze", "steps": 1, "seed": 3}')
        assert answer.status_code == 202, answer.text
        job = over(inside, answer.json()["data"][0]["id"])
        assert (job["status"], job["progress"], job["bits"]) == ("done", 1.0, 16)
        result = inside.get(f"/v1/restorations/{job['id']}/result")
    assert result.content == (tmp_path / "straight.png").read_bytes()
    assert 'filename="deep_restored.png"' in result.headers["content-disposition"]
    (tmp_path / "back.png").write_bytes(result.content)
    back = read_image(tmp_path / "back.png")
    assert back.bits == 16
    assert (back.alpha == read_image(source).alpha).all()


def test_a_format_may_be_asked_for(tiny, tmp_path, monkeypatch):
    restorer, prompts = tiny
    monkeypatch.setenv("EBR_PROMPT_DIR", str(prompts))
    with client(tmp_path / "store", restorer) as inside:
        job = post(inside, png(tmp_path / "a.png"), request='{"task": "haze", "steps": 1}', format="webp").json()["data"][0]
        assert over(inside, job["id"])["result"] == "result.webp"
        assert inside.get(f"/v1/restorations/{job['id']}/result").content[8:12] == b"WEBP"
        refused = post(inside, png(tmp_path / "a.png"), format="exe")
        assert refused.status_code == 400
        assert ".webp" in refused.json()["error"]["message"]


def test_a_clip_keeps_its_frames_and_its_sound(tiny, tmp_path, monkeypatch):
    import av
    import numpy as np

    restorer, prompts = tiny
    monkeypatch.setenv("EBR_PROMPT_DIR", str(prompts))

    def sound(output):
        return output.add_stream("aac", rate=8000)

    def packets(output, stream):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            output.mux_one(packet)

    source = write_clip(tmp_path / "a.mp4", before=sound, other=packets)
    with client(tmp_path / "store", restorer) as inside:
        job = over(inside, post(inside, source, request='{"task": "haze", "steps": 1}').json()["data"][0]["id"])
        assert (job["status"], job["frames"]) == ("done", 5), job
        shown = inside.get(f"/v1/restorations/{job['id']}/view/result", headers={"Range": "bytes=0-99"})
        assert (shown.status_code, len(shown.content), shown.headers["content-type"]) == (206, 100, "video/mp4")
        (tmp_path / "result.mp4").write_bytes(inside.get(f"/v1/restorations/{job['id']}/result").content)
    with av.open(str(source)) as before, av.open(str(tmp_path / "result.mp4")) as after:
        sounds = [[bytes(packet) for packet in each.demux(audio=0) if packet.size] for each in (before, after)]
    assert sounds[0] == sounds[1]
    assert sounds[0]


def test_a_clip_goes_on_in_the_middle_after_the_end_of_the_server(tiny, tmp_path, monkeypatch):
    from ebr_engine.media.video import parts

    restorer, prompts = tiny
    monkeypatch.setenv("EBR_PROMPT_DIR", str(prompts))
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    source = write_clip(tmp_path / "a.mp4")
    restorer.restore_file(source, tmp_path / "straight.mp4", task="haze", steps=1, chunk_frames=1, chunk_overlap=0)
    begun_at = []

    class Seen(parts.Parts):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            begun_at.append(self.frames)

    monkeypatch.setattr(parts, "Parts", Seen)
    asked = '{"task": "haze", "steps": 1, "chunk_frames": 1, "chunk_overlap": 0}'
    with client(tmp_path / "store", restorer) as inside:
        heard, calls = inside.hub.worker._heard, []

        def stops(share, text):
            calls.append(text)
            if len(calls) == 4:
                inside.hub.worker.stop()
            heard(share, text)

        monkeypatch.setattr(inside.hub.worker, "_heard", stops)
        id = post(inside, source, request=asked).json()["data"][0]["id"]
        until(inside.hub.worker.stopping.is_set)
    with client(tmp_path / "store", restorer) as inside:
        job = over(inside, id)
        assert (job["status"], job["frames"]) == ("done", 5), job
        result = inside.get(f"/v1/restorations/{id}/result").content
        assert sorted(each.name for each in (inside.hub.store.files / id).iterdir()) == ["result.mp4", "source.mp4"]
    assert begun_at[0] == 0 < begun_at[1]
    assert result == (tmp_path / "straight.mp4").read_bytes()


def test_an_engine_file_is_served(tmp_path, tiny):
    restorer, prompts = tiny
    plan = restorer.plan(prompt=str(prompts / "mini" / "haze.safetensors"), steps=1)
    restorer.build(tmp_path / "haze.ebr", plan)
    with client(tmp_path / "store", Restorer.from_engine(tmp_path / "haze.ebr", compile="off")) as inside:
        job = over(inside, post(inside, png(tmp_path / "a.png"), request="{}").json()["data"][0]["id"])
    assert job["status"] == "done", job


def test_what_a_browser_cannot_show_is_shown_as_something_that_it_can(stand_in, tmp_path):
    deep = png(tmp_path / "deep.tif", 20, 30, bits=16)
    with client(tmp_path / "store", stand_in) as inside:
        job = over(inside, post(inside, deep).json()["data"][0]["id"])
        shown = inside.get(f"/v1/restorations/{job['id']}/view/source")
        assert shown.headers["content-type"] == "image/webp"
        assert inside.get(f"/v1/restorations/{job['id']}/result").content == deep.read_bytes()


def test_a_picture_that_another_library_reads_is_taken(tiny, tmp_path, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    restorer, prompts = tiny
    monkeypatch.setenv("EBR_PROMPT_DIR", str(prompts))
    Image.new("RGB", (24, 16), (90, 120, 150)).save(tmp_path / "a.bmp")
    with client(tmp_path / "store", restorer) as inside:
        job = over(inside, post(inside, tmp_path / "a.bmp", request='{"task": "haze", "steps": 1}').json()["data"][0]["id"])
    assert (job["status"], job["result"]) == ("done", "result.png"), job


def test_progress_comes_as_events(stand_in, tmp_path):
    stand_in.go.clear()
    with client(tmp_path / "store", stand_in) as inside:
        job = post(inside, png(tmp_path / "a.png")).json()["data"][0]
        stand_in.began.wait(10)
        stand_in.go.set()
        lines = inside.get(f"/v1/restorations/{job['id']}/events").text.splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert events[-1]["status"] == "done"
    assert [each["progress"] for each in events] == sorted(each["progress"] for each in events)


def test_a_running_job_ends_after_its_step(stand_in, tmp_path):
    stand_in.go.clear()
    with client(tmp_path / "store", stand_in) as inside:
        first, second = (post(inside, png(tmp_path / "a.png")).json()["data"][0] for _ in range(2))
        stand_in.began.wait(10)
        assert inside.post(f"/v1/restorations/{second['id']}/cancel").json()["status"] == "cancelled"
        assert inside.delete(f"/v1/restorations/{first['id']}").status_code == 409
        stand_in.go.set()
        assert over(inside, first["id"])["status"] == "cancelled"
        assert inside.get(f"/v1/restorations/{first['id']}/result").status_code == 404
        folder = inside.hub.store.files / first["id"]
        assert [each.name for each in folder.iterdir()] == ["source.png"]
        assert inside.delete(f"/v1/restorations/{first['id']}").status_code == 204
        assert not folder.exists()
        assert inside.get(f"/v1/restorations/{first['id']}").status_code == 404
        assert len(stand_in.seen) == 1


def test_a_picture_of_many_tiles_ends_after_the_tile_that_is_computed(tiny, tmp_path, monkeypatch):
    restorer, prompts = tiny
    monkeypatch.setenv("EBR_PROMPT_DIR", str(prompts))
    with client(tmp_path / "store", restorer) as inside:
        worker, told = inside.hub.worker, []

        def heard(share, text, original=worker._heard):
            told.append(share)
            worker.cancel(worker._job.id)
            original(share, text)

        monkeypatch.setattr(worker, "_heard", heard)
        asked = '{"task": "haze", "steps": 1, "tile": 32, "tile_overlap": 8}'
        job = post(inside, png(tmp_path / "a.png", 120, 160), request=asked).json()["data"][0]
        assert over(inside, job["id"])["status"] == "cancelled"
    assert len(told) == 1
    assert told[0] < 0.5  # of the only step


def test_a_failure_speaks_of_the_clients_file_and_not_of_the_servers(tiny, tmp_path, monkeypatch):
    restorer, prompts = tiny
    monkeypatch.setenv("EBR_PROMPT_DIR", str(prompts))
    damaged = tmp_path / "mine.png"
    damaged.write_bytes(png(tmp_path / "a.png", 64, 64).read_bytes()[:-60])
    with client(tmp_path / "store", restorer) as inside:
        job = over(inside, post(inside, damaged, request='{"task": "haze", "steps": 1}').json()["data"][0]["id"])
        assert job["status"] == "failed"
        assert job["error"].startswith("mine.png: ")
        assert str(tmp_path) not in json.dumps(job)
        assert (
            over(inside, post(inside, png(tmp_path / "b.png"), request='{"task": "haze", "steps": 1}').json()["data"][0]["id"])[
                "status"
            ]
            == "done"
        )


@pytest.mark.parametrize("kind", [RuntimeError, KeyError])
def test_a_bug_fails_one_job_and_its_words_reach_neither_client_nor_log(stand_in, tmp_path, caplog, kind):
    stand_in.error = kind("the words of a private picture")
    with client(tmp_path / "store", stand_in) as inside:
        job = over(inside, post(inside, png(tmp_path / "secret name.png")).json()["data"][0]["id"])
        assert (job["status"], job["error"]) == ("failed", "an error inside the server; its log has more")
        stand_in.error = None
        assert over(inside, post(inside, png(tmp_path / "b.png")).json()["data"][0]["id"])["status"] == "done"
    assert kind.__name__ in caplog.text
    assert "private" not in caplog.text
    assert "secret name" not in caplog.text


def test_past_the_bound_clients_are_told_to_come_again(stand_in, tmp_path):
    stand_in.go.clear()
    with client(tmp_path / "store", stand_in, queue=2) as inside:
        running = post(inside, png(tmp_path / "a.png")).json()["data"][0]
        stand_in.began.wait(10)
        until(lambda: inside.get(f"/v1/restorations/{running['id']}").json()["status"] == "running")
        both = post(inside, png(tmp_path / "a.png"), png(tmp_path / "b.png"))
        assert [job["ahead"] for job in both.json()["data"]] == [1, 2]
        full = post(inside, png(tmp_path / "a.png"))
        assert full.status_code == 429
        assert int(full.headers["Retry-After"]) > 0
        assert "ebr_queue_length 2.0" in inside.get("/metrics").text
        stand_in.go.set()
        assert over(inside, both.json()["data"][1]["id"])["status"] == "done"
        assert 'ebr_jobs_total{state="done"} 3.0' in inside.get("/metrics").text


def test_the_end_of_the_server_keeps_the_queue(tmp_path):
    first = StandIn()
    first.go.clear()
    with client(tmp_path / "store", first) as inside:
        ids = [post(inside, png(tmp_path / f"{name}.png")).json()["data"][0]["id"] for name in "abc"]
        first.began.wait(10)
        inside.hub.worker.stopping.set()
        first.go.set()
    again = StandIn()
    with client(tmp_path / "store", again) as inside:
        assert [over(inside, id)["status"] for id in ids] == ["done"] * 3
        names = [inside.get(f"/v1/restorations/{id}").json()["name"] for id in ids]
    assert names == ["a.png", "b.png", "c.png"]
    assert len(again.seen) == 3


def test_a_job_that_ends_the_process_again_and_again_is_given_up(stand_in, tmp_path):
    from ebr_engine.serve.store import Store

    source = png(tmp_path / "source.png")
    store = Store(tmp_path / "store")
    (id,) = store.add([(source, ".png", "a.png")], {"task": "haze"})
    for _ in range(3):
        assert store.claim().id == id
        store.close()  # as a killed process leaves it
        store = Store(tmp_path / "store")
    assert store.get(id).state == "failed"
    assert "ended 3 times" in store.get(id).error
    store.close()


def test_one_store_serves_one_server(tmp_path):
    from ebr_engine.errors import EbrError
    from ebr_engine.serve.store import Store

    store = Store(tmp_path / "store")
    with pytest.raises(EbrError, match="another server uses this store"):
        Store(tmp_path / "store")
    store.close()


def test_files_go_by_age_and_by_size(tmp_path):
    from ebr_engine.serve.store import DONE, Store, StoreFull

    def added(store, number):
        path = tmp_path / f"{number}.png"
        path.write_bytes(b"x" * 1000)
        return store.add([(path, ".png", "a.png")], {})[0]

    store = Store(tmp_path / "store", limit=2500, keep=1000)
    first, second = added(store, 1), added(store, 2)
    with pytest.raises(StoreFull):
        added(store, 3)
    store.finish(first, DONE)
    third = added(store, 4)
    assert store.get(first) is None
    assert not (store.files / first).exists()
    store.finish(second, DONE)
    store.keep = -1
    store.prune()
    assert [job.id for job in store.newest()] == [third]
    assert store.used() == 1000
    store.close()


def test_sigterm_in_a_job_ends_with_code_0_and_the_job_is_done_after_the_restart(tmp_path):
    script = (
        "import sys, threading; from pathlib import Path; from tests.serve.conftest import StandIn;"
        "from ebr_engine.serve.app import serve; from ebr_engine.serve.settings import Settings;"
        "one = StandIn(steps=10**6); one.go.wait = lambda s: threading.Event().wait(0.01);"
        "serve(Settings(Path(sys.argv[1]), port=int(sys.argv[2])), one)"
    )
    with process(script, tmp_path) as (inside, server):
        id = post(inside, png(tmp_path / "a.png")).json()["data"][0]["id"]
        until(lambda: inside.get(f"/v1/restorations/{id}").json()["progress"] > 0)
        with inside.stream("GET", f"/v1/restorations/{id}/events"):  # an open stream does not hold it
            server.terminate()
            assert server.wait(30) == 0
    with client(tmp_path / "store", StandIn()) as inside:
        assert over(inside, id)["status"] == "done"
