"""What comes from the network cannot get in, get out, or keep the server from answering."""

import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ebr_engine.errors import EbrError
from ebr_engine.serve.settings import Settings, read_token
from tests.media.clip_maker import write_clip
from tests.serve.conftest import StandIn, client, listening, over, png, post, process, until

TOKEN = "a-token-of-the-tests-0123"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.3", "example.org"])
def test_other_machines_are_let_in_by_token_only(tmp_path, host):
    with pytest.raises(EbrError, match="--token-file"):
        Settings(tmp_path, host=host)
    assert Settings(tmp_path, host=host, token=TOKEN).admits(TOKEN)
    for local in ("127.0.0.1", "localhost", "::1"):
        Settings(tmp_path, host=local)


def test_tokens_are_compared_in_constant_time(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda one, other: compared.append((one, other)) or one == other)
    assert not Settings(tmp_path, token=TOKEN).admits("a-token")
    assert Settings(tmp_path, token=TOKEN).admits(TOKEN)
    assert len(compared) == 2


def test_a_token_file_is_private_and_holds_one_word(tmp_path):
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o644)
    with pytest.raises(EbrError, match="chmod 600"):
        read_token(path)
    path.chmod(0o600)
    assert read_token(path) == TOKEN
    path.write_text("two words")
    with pytest.raises(EbrError, match="holds 2"):
        read_token(path)
    with pytest.raises(EbrError, match="at least 16"):
        Settings(tmp_path, token="short")


def test_without_the_token_nothing_is_told_and_nothing_read(tmp_path):
    with client(tmp_path / "store", StandIn(), token=TOKEN) as inside:
        for path in ("/v1/restorations", "/v1/models", "/metrics", "/openapi.json", "/docs", "/v1/restorations/x/result"):
            answer = inside.get(path)
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), path
        for wrong in ("Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer é", ""):
            assert inside.get("/v1/models", headers={"Authorization": wrong.encode()}).status_code == 401
        assert post(inside, png(tmp_path / "a.png")).status_code == 401
        assert inside.get("/healthz").status_code == inside.get("/").status_code == 200
        assert inside.post("/v1/session").status_code == 401
        shown = {"Authorization": f"Bearer {TOKEN}"}
        assert inside.get("/v1/models", headers=shown).status_code == 200
        cookie = inside.post("/v1/session", headers=shown).headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert inside.get("/v1/models").status_code == 200  # by the cookie
        assert not list(inside.hub.store.newest())


def test_other_sites_pages_and_names_are_refused(stand_in, tmp_path):
    with client(tmp_path / "store", stand_in) as inside:
        assert inside.get("/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403
        assert inside.get("/v1/models", headers={"Origin": "null"}).status_code == 403
        assert inside.get("/v1/models", headers={"Host": "evil.example:7860"}).status_code == 403
        fine = inside.get("/v1/models", headers={"Origin": "http://127.0.0.1"})
        assert fine.status_code == 200
        assert not [name for name in fine.headers if name.startswith("access-control")]
        assert "default-src 'self'" in inside.get("/").headers["content-security-policy"]


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "a\x1b[31m.png", "x" * 500, ".."])
def test_names_never_become_paths(stand_in, tmp_path, name):
    with client(tmp_path / "store", stand_in) as inside:
        content = png(tmp_path / "a.png").read_bytes()
        answer = inside.post("/v1/restorations", files=[("files", (name, content))], data={"request": '{"task": "haze"}'})
        job = over(inside, answer.json()["data"][0]["id"])
        assert job["status"] == "done"
        assert "/" not in job["name"]
        assert "\x1b" not in job["name"]
        assert sorted(each.name for each in (inside.hub.store.files / job["id"]).iterdir()) == ["result.png", "source.png"]
        assert inside.get(f"/v1/restorations/{job['id']}/result").content == content


@pytest.mark.parametrize("id", ["..", "../../jobs.sqlite", "%2e%2e%2fjobs.sqlite", "%00", "' OR 1=1 --"])
def test_only_jobs_are_readable(stand_in, tmp_path, id):
    with client(tmp_path / "store", stand_in) as inside:
        for path in (f"/v1/restorations/{id}/result", f"/v1/restorations/{id}/view/source", f"/v1/videos/{id}/content"):
            assert inside.get(path).status_code == 404, path
        assert b"SQLite" not in inside.get(f"/page/{id}").content


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": [["/etc/passwd", 1]]},
        {"task": "haze", "model": "/etc"},
        {"task": "haze", "engine": "/etc/passwd"},
        {"task": "haze", "encoder": ["stats=/tmp/x"]},
        {"task": "haze", "backbone": "wan"},
        {"task": "/etc/passwd"},
        {"task": "haze", "steps": 10**9},
        {"task": "haze", "nothing": 1},
        {},
    ],
)
def test_what_names_files_or_is_the_servers_cannot_be_asked_for(stand_in, tmp_path, request_):
    with client(tmp_path / "store", stand_in) as inside:
        answer = post(inside, png(tmp_path / "a.png"), request=json.dumps(request_))
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]
        assert not inside.hub.store.newest()
    assert not stand_in.seen


@pytest.mark.parametrize("request_", ["", "[]", "null", "nonsense", "[" * 100_000, '{"task": {"a": 1}}'])
def test_a_request_that_is_none_is_told(stand_in, tmp_path, request_):
    with client(tmp_path / "store", stand_in) as inside:
        assert post(inside, png(tmp_path / "a.png"), request=request_).status_code == 400


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1:1/x.png'/></svg>",
        b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'/>",
        b"%PDF-1.4",
        b"",
    ],
)
def test_files_that_lead_to_others_are_no_pictures_or_clips(stand_in, tmp_path, content):
    disguised = tmp_path / "clip.mp4"
    disguised.write_bytes(content)
    with client(tmp_path / "store", stand_in) as inside:
        answer = post(inside, disguised)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("clip.mp4: ")
        assert not list(inside.hub.store.incoming.iterdir())


def test_pixels_are_counted_before_any_is_decoded(stand_in, tmp_path):
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    bomb = tmp_path / "bomb.png"  # its header promises 60000 x 60000 pixels; there is next to nothing behind it
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))
    with client(tmp_path / "store", stand_in) as inside:
        answer = post(inside, bomb)
        assert answer.status_code == 400
        assert "60000 x 60000" in answer.json()["error"]["message"]


def test_frames_are_counted_before_any_is_decoded(stand_in, tmp_path):
    import pyvips

    clip = write_clip(tmp_path / "clip.mp4")  # of five frames
    moving = pyvips.Image.arrayjoin([pyvips.Image.black(16, 16).linear(1, value).cast("uchar") for value in range(5)], across=1)
    moving.copy().write_to_file(str(tmp_path / "moving.webp"), page_height=16, lossless=True)
    for name in (clip, tmp_path / "moving.webp"):
        with client(tmp_path / "store", stand_in, frames=4) as inside:
            answer = post(inside, name)
            assert answer.status_code == 400, name
            assert answer.json()["error"]["message"] == f"{name.name}: has 5 frames, more than the limit of 4"
            assert not list(inside.hub.store.incoming.iterdir())
        with client(tmp_path / "store", stand_in, frames=5) as inside:
            assert post(inside, name).status_code == 202, name


def test_all_pages_count(stand_in, tmp_path):
    import pyvips

    page = pyvips.Image.black(100, 100)
    path = tmp_path / "pages.tif"
    whole = pyvips.Image.arrayjoin([page] * 8, across=1)
    whole.copy().write_to_file(str(path), page_height=100)
    with client(tmp_path / "store", stand_in, megapixels=0.05) as inside:
        assert post(inside, path).status_code == 400
    with client(tmp_path / "store", stand_in, megapixels=0.09) as inside:
        assert post(inside, path).status_code == 202


def test_a_body_is_cut_off_at_the_limit_whether_it_says_its_length_or_not(stand_in, tmp_path):
    with client(tmp_path / "store", stand_in, upload_bytes=10_000) as inside:
        big = tmp_path / "big.png"
        big.write_bytes(b"x" * 20_000)
        assert post(inside, big).status_code == 413

        def endless():
            yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
            for _ in range(1000):
                yield b"x" * 1000

        answer = inside.post("/v1/restorations", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"})
        assert answer.status_code == 413
        assert post(inside, png(tmp_path / "a.png")).status_code == 202


def test_a_bomb_of_parts_is_refused(stand_in, tmp_path):
    with client(tmp_path / "store", stand_in) as inside:
        parts = [("files", (f"{number}.png", b"x")) for number in range(5000)]
        assert inside.post("/v1/restorations", files=parts, data={"request": "{}"}).status_code == 400
        fields = "&".join(f"a{number}=1" for number in range(20_000))
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        assert inside.post("/v1/restorations", content=fields, headers=kind).status_code == 400
        assert inside.get("/healthz").status_code == 200


def test_slow_bodies_are_let_go_and_others_answered_meanwhile(stand_in, tmp_path):
    import httpx

    lines = (
        "POST /v1/restorations HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Length: 1000",
        "Content-Type: multipart/form-data; boundary=b",
    )
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    with listening(tmp_path / "store", stand_in, idle_seconds=1.0, uploads=2) as server:
        slow = [socket.create_connection(("127.0.0.1", server.port), timeout=15) for _ in range(20)]
        for each in slow:
            each.sendall(head + b"--b")
        assert httpx.get(f"{server.url}/healthz", timeout=5).status_code == 200
        answers = [each.recv(1000) for each in slow]
        assert {answer[9:12] for answer in answers} <= {b"408", b"429"}
        assert b"408" in {answer[9:12] for answer in answers}
        for each in slow:
            each.close()
        with httpx.Client(base_url=server.url, timeout=10) as inside:
            assert post(inside, png(tmp_path / "a.png")).status_code == 202


def test_two_hundred_parallel_requests_are_all_answered(stand_in, tmp_path):
    import httpx

    source = png(tmp_path / "a.png").read_bytes()
    with (
        listening(tmp_path / "store", stand_in, queue=30) as server,
        httpx.Client(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)) as inside,
    ):
        stand_in.go.clear()

        def send(_):
            files = [("files", ("a.png", source))]
            return inside.post("/v1/restorations", files=files, data={"request": '{"task": "haze"}'})

        with ThreadPoolExecutor(200) as pool:
            codes = [answer.status_code for answer in pool.map(send, range(200))]
        assert set(codes) <= {202, 429}
        assert 30 <= codes.count(202) <= 31  # one may run already
        assert inside.get("/healthz").status_code == 200
        stand_in.go.set()
        until(lambda: server.hub.store.count("done") == codes.count(202))


def test_nothing_of_an_input_is_in_the_log(stand_in, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG, "ebr_engine.serve")
    with client(tmp_path / "store", stand_in) as inside:
        over(
            inside,
            post(inside, png(tmp_path / "holiday of mine.png"), request='{"task": "haze", "seed": 987654}').json()["data"][0][
                "id"
            ],
        )
        inside.get("/v1/restorations/holiday-of-mine")
        post(inside, png(tmp_path / "holiday of mine.png"), request='{"task": "holiday"}')
    written = caplog.text + "".join(capfd.readouterr())
    ours = "\n".join(line for line in written.splitlines() if "httpx" not in line)
    assert "done after" in ours
    assert "holiday" not in ours
    assert "987654" not in ours


def test_nothing_of_a_damaged_input_is_in_the_log_of_the_whole_process(tmp_path):
    """As the command logs, with all that libraries write past Python."""
    picture, clip = png(tmp_path / "holiday.png", 64, 64), write_clip(tmp_path / "holiday.mp4")
    picture.write_bytes(picture.read_bytes()[:-60])
    clip.write_bytes(clip.read_bytes()[:-200])
    script = (
        "import sys; from pathlib import Path; from ebr_engine import Restorer; from ebr_engine.serve.app import serve;"
        "from ebr_engine.serve.settings import Settings;"
        "serve(Settings(Path(sys.argv[1]), port=int(sys.argv[2])), Restorer('mini', compile='off'))"
    )
    with process(script, tmp_path) as (inside, server):
        for path in (picture, clip):
            answer = post(inside, path, request='{"task": "haze", "steps": 1}')
            if answer.status_code == 202:
                over(inside, answer.json()["data"][0]["id"])
        post(inside, picture, request='{"task": "holiday"}')
        server.terminate()
        written = b"".join(server.communicate(timeout=60)).decode()
    assert "after" in written
    assert "holiday" not in written


def test_the_store_is_for_its_user_alone(stand_in, tmp_path):
    with client(tmp_path / "store", stand_in) as inside:
        assert (Path(inside.hub.store.folder).stat().st_mode & 0o077) == 0
