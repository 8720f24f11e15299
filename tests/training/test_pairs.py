"""Pairs are found in the usual layouts and lists; what has no counterpart is named."""

import json
import shutil

import pytest

from ebr_engine.errors import EbrError
from ebr_engine.training.pairs import FOLDERS, find_pairs


def names(root, **how):
    found, problems = find_pairs(root, **how)
    return [pair.name for pair in found], [str(problem) for problem in problems]


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


@pytest.mark.parametrize("folders", [*FOLDERS, ("LQ", "GT"), ("Blur", "Sharp")])
def test_folders_of_every_known_name_pair(tmp_path, folders):
    low, high = folders
    touch(tmp_path, f"{low}/a.png", f"{low}/deep/b.jpg", f"{high}/a.tif", f"{high}/deep/b.png", f"{high}/.hidden.png")
    pairs, problems = find_pairs(tmp_path)
    assert problems == []
    assert [(pair.clean, pair.degraded) for pair in pairs] == [
        ((tmp_path / high / "a.tif",), (tmp_path / low / "a.png",)),
        ((tmp_path / high / "deep" / "b.png",), (tmp_path / low / "deep" / "b.jpg",)),
    ]


def test_of_a_data_set_its_training_part_is_taken(tmp_path):
    touch(tmp_path, *(f"{part}/Rain13K/{side}/{part}.png" for part in ("train", "test") for side in ("input", "target")))
    assert names(tmp_path) == (["train/Rain13K/target/train.png".removesuffix(".png")], [])


def test_a_test_part_is_left_aside_where_there_is_no_training_part(tmp_path):
    touch(tmp_path, *(f"{part}/{side}/{part}.png" for part in ("Test", "01Blur", "02Noise") for side in ("LQ", "GT")))
    assert names(tmp_path)[0] == ["01Blur/GT/01Blur", "02Noise/GT/02Noise"]


def test_a_basicsr_list_says_which_files_count(tmp_path):
    touch(tmp_path, *(f"{side}/{i}.png" for side in ("lq", "gt") for i in range(4)))
    (tmp_path / "meta_info_some.txt").write_text("1.png (480,480,3)\n\n3.png, 3.png\nmissing.png (4,4,3)\n")
    found, problems = names(tmp_path)
    assert found == ["gt/1", "gt/3"]
    assert len(problems) == 1
    assert "missing" in problems[0]


def test_what_has_no_counterpart_is_named(tmp_path):
    touch(tmp_path, "input/a.png", "target/a.png", "input/b.png", "target/c.png", "target/a.jpg")
    found, problems = names(tmp_path)
    assert found == ["target/a"]
    assert len(problems) == 3
    for path, reason in ((tmp_path / "input" / "b", "target"), (tmp_path / "target" / "c", "input"), ("a.png", "a.jpg")):
        assert any(str(path) in problem and reason in problem for problem in problems)


def test_folders_of_frames_are_clips_where_clips_are_asked_for(tmp_path):
    frames = [f"{i}.png" for i in range(3)]
    touch(tmp_path, *(f"{side}/street/{frame}" for side in ("input", "target") for frame in frames))
    touch(tmp_path, "input/film.mp4", "target/film.mkv", "input/lone.png", "target/lone.png")
    pairs, problems = find_pairs(tmp_path, frames=2)
    assert [pair.name for pair in pairs] == ["target/film", "target/street"]
    assert pairs[1].degraded == tuple(tmp_path / "input" / "street" / frame for frame in frames)
    assert all("lone.png" in str(problem) and "frames = 1" in str(problem) for problem in problems)
    assert len(find_pairs(tmp_path)[0]) == 5  # frame by frame otherwise


def test_clean_media_alone_are_degraded_later(tmp_path):
    touch(tmp_path, "a.png", "b/c.mp4")
    pairs, problems = find_pairs(tmp_path, synthetic=True)
    assert [(pair.name, pair.degraded) for pair in pairs] == [("a", None), ("b/c", None)]
    assert problems == []


RECORD = {"image_path": "data/Rain/1.png", "target_path": "data/GT/1.png", "degradation": "Rain", "no_reference": False}


def test_the_released_lists_are_read(tmp_path):
    touch(tmp_path, "data/Rain/1.png", "data/GT/1.png", *(f"data/{side}/f{i}.png" for side in ("Blur", "Sharp") for i in (1, 2)))
    clip = {key: [f"data/{side}/f{i}.png" for i in (1, 2)] for key, side in (("image_path", "Blur"), ("target_path", "Sharp"))}
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "all.json"
    path.write_text(json.dumps([RECORD, clip]))
    pairs, problems = find_pairs(path)  # paths are relative to the folder above the list's
    assert problems == []
    assert (pairs[0].degraded, pairs[0].clean) == ((tmp_path / "data/Rain/1.png",), (tmp_path / "data/GT/1.png",))
    assert pairs[1].clean == (tmp_path / "data/Sharp/f1.png", tmp_path / "data/Sharp/f2.png")


@pytest.mark.parametrize("form", ["list", "table", "lines"])
def test_other_keys_and_forms_of_lists_are_read(tmp_path, form):
    touch(tmp_path, "a.png", "b.png")
    records = [{"lq": "a.png", "gt": "b.png"}, {"input_path": "b.png", "target": "a.png"}]
    path = tmp_path / f"x.json{'l' if form == 'lines' else ''}"
    content = {"list": json.dumps(records), "table": json.dumps({"version": 1, "data": records})}
    path.write_text(content.get(form) or "\n".join(map(json.dumps, records)))
    assert len(find_pairs(path)[0]) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target_path": None}, "no target"),
        ({"no_reference": True}, "no target"),
        ({"target_path": "data/Rain/1.png"}, "no target"),
        ({"image_path": "data/Rain/2.png"}, "2.png, which does not exist"),
        ({"image_path": ["data/Rain/1.png", "data/GT/1.png"]}, "2 input and 1 target frames"),
        ({"image_path": 3}, "has to be a text"),
        ({"image_path": None}, "names no input"),
    ],
)
def test_records_without_a_target_are_named(tmp_path, change, reason):
    touch(tmp_path, "data/Rain/1.png", "data/GT/1.png")
    (tmp_path / "x.json").write_text(json.dumps([RECORD, RECORD | change, "text"]))
    pairs, problems = find_pairs(tmp_path / "x.json")
    assert len(pairs) == 1
    assert "entry 2" in str(problems[0])
    assert reason in str(problems[0])
    assert "entry 3" in str(problems[1])


def test_a_folder_of_frames_in_a_list_is_a_clip(tmp_path):
    touch(tmp_path, *(f"{side}/{i}.png" for side in ("lq", "gt") for i in (1, 2, 10)), "none/notes.txt")
    (tmp_path / "x.json").write_text(json.dumps([{"lq": "lq", "gt": "gt"}, {"lq": "none", "gt": "gt"}]))
    (pair,), (problem,) = find_pairs(tmp_path / "x.json")
    assert pair.clean == tuple(tmp_path / "gt" / f"{i}.png" for i in (1, 2, 10))
    assert "no pictures" in str(problem)


@pytest.mark.parametrize("content", ["{", "3", "[]", '{"a": 1}'])
def test_what_is_no_list_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(EbrError, match=r"x\.json"):
        find_pairs(tmp_path / "x.json")


def test_nothing_to_find_is_told_with_what_to_do(tmp_path):
    with pytest.raises(EbrError, match="nowhere"):
        find_pairs(tmp_path / "nowhere")
    touch(tmp_path, "photos/a.png")
    with pytest.raises(EbrError, match=r"input/ and target/.*synthetic"):
        find_pairs(tmp_path)
    shutil.rmtree(tmp_path / "photos")
    touch(tmp_path, "input/a.png", "target/b.png")
    with pytest.raises(EbrError, match=r"no pairs.*counterpart"):
        find_pairs(tmp_path)
