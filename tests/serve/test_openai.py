"""OpenAI's own client speaks with the server: pictures and clips, and errors that it understands."""

import base64
import io

import pytest

from ebr_engine.errors import EbrError
from ebr_engine.serve.openai import tasks_of
from tests.serve.conftest import StandIn, client, listening, png, until

KNOWN = ["blur", "haze", "lowlight", "rain", "snow", "auto"]


@pytest.fixture
def stand_in_server(tmp_path):
    restorer = StandIn()
    with listening(tmp_path / "store", restorer) as server:
        server.restorer = restorer
        yield server


@pytest.fixture
def speaker(stand_in_server):
    openai = pytest.importorskip("openai", reason="needs OpenAI's client")
    with openai.OpenAI(base_url=f"{stand_in_server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.mark.parametrize(
    ("prompt", "tasks"),
    [
        ("rain", "rain"),
        ("Remove haze.", "haze"),
        ("auto", "auto"),
        ("please remove the rain and the fog from this photo", "rain+haze"),
        ("rain:0.7+haze:0.3", "rain:0.7+haze:0.3"),
        ("fix low light", "lowlight"),
        ("dehaze, then deblur", None),
        ("remove dust", None),
        ("restore", None),
        ("", None),
    ],
)
def test_a_prompt_is_read_as_tasks_or_refused_with_their_list(prompt, tasks):
    if tasks is None:
        with pytest.raises(EbrError, match="haze, lowlight, rain"):
            tasks_of(prompt, KNOWN)
    else:
        assert tasks_of(prompt, KNOWN) == tasks


def test_pictures_are_edited(speaker, stand_in_server, tmp_path):
    one, other = png(tmp_path / "a.png"), png(tmp_path / "b.png", bits=16)
    single = speaker.images.edit(model="ebr-mini", image=one.open("rb"), prompt="remove haze")
    both = speaker.images.edit(model="ebr-mini", image=[one.open("rb"), other.open("rb")], prompt="rain")
    assert base64.b64decode(single.data[0].b64_json) == one.read_bytes()
    assert [base64.b64decode(each.b64_json) for each in both.data] == [one.read_bytes(), other.read_bytes()]
    assert [options["task"] for options in stand_in_server.restorer.seen] == ["haze", "rain", "rain"]


def test_what_cannot_be_done_is_an_error_of_the_clients_kind(speaker, tmp_path):
    import openai

    def edit(**more):
        asked = {"model": "ebr-mini", "image": png(tmp_path / "a.png").open("rb"), "prompt": "haze"}
        return speaker.images.edit(**{**asked, **more})

    with pytest.raises(openai.BadRequestError, match=r"'dust' is no task; choose from: .*haze"):
        edit(prompt="remove dust")
    with pytest.raises(openai.BadRequestError, match="this server has the model ebr-mini"):
        edit(model="gpt-image-1")
    with pytest.raises(openai.BadRequestError, match="n can only be 1"):
        edit(n=2)
    with pytest.raises(openai.BadRequestError, match="is no picture or clip"):
        edit(image=("a.png", io.BytesIO(b"not a picture at all"), "image/png"))
    assert [each.id for each in speaker.models.list()] == ["ebr-mini"]


def test_clips_are_made_and_fetched(speaker, stand_in_server, tmp_path):
    source = png(tmp_path / "a.png").read_bytes()  # the stand-in copies whatever it is given
    made = speaker.videos.create(model="ebr-mini", prompt="rain", input_reference=("clip.png", source, "image/png"))
    assert made.status in ("queued", "in_progress", "completed")
    done = until(lambda: (one := speaker.videos.retrieve(made.id)).status == "completed" and one)
    assert (done.progress, done.prompt) == (100, "rain")
    assert speaker.videos.download_content(made.id).read() == source
    assert speaker.videos.delete(made.id).deleted


def test_a_client_that_goes_away_cancels_its_job(stand_in_server, tmp_path):
    import httpx

    stand_in_server.restorer.go.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{stand_in_server.url}/v1/images/edits",
            files={"image": ("a.png", png(tmp_path / "a.png").read_bytes())},
            data={"prompt": "haze"},
            timeout=httpx.Timeout(10, read=0.5),
        )
    store = stand_in_server.hub.store
    until(lambda: stand_in_server.hub.worker._cancelled)
    stand_in_server.restorer.go.set()
    assert until(lambda: store.newest()[0].is_over and store.newest()[0]).state == "cancelled"


def test_an_engine_file_takes_no_task(tmp_path):
    restorer = StandIn()
    restorer.built = object()
    with client(tmp_path / "store", restorer) as inside:
        files = {"image": ("a.png", png(tmp_path / "a.png").read_bytes())}
        assert inside.post("/v1/images/edits", files=files, data={"prompt": "anything"}).status_code == 200
    assert restorer.seen == [{}]
