"""Which file is compared with which: stems, folders and lists; every mismatch is named."""

import json

import numpy as np
import pytest

from ebr_engine.errors import EbrError
from ebr_engine.evaluation.paired import pair_folders, read_list
from ebr_engine.media.images import write_image
from ebr_engine.media.picture import Picture


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Make pictures by name, each of one value, in an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def make(*names, size=(8, 8), value=0.5):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            write_image(tmp_path / name, Picture(np.full((*size, 3), value, np.float32)))
        return tmp_path

    return make


def told(items):
    return [
        (item.name, *(media and str(media.paths[0]) for media in (item.source, item.target, item.restored))) for item in items
    ]


def test_files_are_paired_by_path_and_stem_whatever_their_suffix(files):
    root = files("in/a.png", "in/deep/b.jpg", "gt/a.webp", "gt/deep/b.png", "out/a.png", "out/deep/b.png")
    items = pair_folders(*(root / name for name in ("in", "gt", "out")))
    assert told(items) == [
        ("a", f"{root}/in/a.png", f"{root}/gt/a.webp", f"{root}/out/a.png"),
        ("deep/b", f"{root}/in/deep/b.jpg", f"{root}/gt/deep/b.png", f"{root}/out/deep/b.png"),
    ]
    assert told(pair_folders(None, root / "gt", root / "out"))[0] == ("a", None, f"{root}/gt/a.webp", f"{root}/out/a.png")


def test_an_unpaired_folder_has_no_targets(files):
    root = files("in/a.png", "in/.hidden.png")
    (root / "in" / "notes.txt").write_text("no picture")
    assert told(pair_folders(root / "in", None, None)) == [("a", f"{root}/in/a.png", None, None)]


def test_single_files_need_no_common_name(files):
    root = files("rainy.png", "clean.png")
    assert told(pair_folders(root / "rainy.png", root / "clean.png", None)) == [
        ("rainy", f"{root}/rainy.png", f"{root}/clean.png", None)
    ]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["in/a.png", "in/b.png", "gt/a.png"], ["in/b.png", "no b in", "gt", "--partial"]),
        (["in/a.png", "gt/a.png", "gt/c.png"], ["gt/c.png", "no c in", "in", "--partial"]),
        (["in/a.png", "in/a.jpg", "gt/a.png"], ["in/a.jpg", "in/a.png", "same name"]),
        (["in/a.png", "gt/.keep.png"], ["gt", "no pictures or clips"]),
        (["in/a.png"], ["gt", "no such file or folder"]),
    ],
)
def test_what_has_no_partner_is_named(files, names, words):
    root = files(*names)
    with pytest.raises(EbrError) as error:
        pair_folders(root / "in", root / "gt", None)
    for word in words:
        assert word in str(error.value)


def test_a_part_can_be_measured(files):
    root = files("in/a.png", "in/b.png", "gt/a.png", "gt/c.png")
    assert [item.name for item in pair_folders(root / "in", root / "gt", None, partial=True)] == ["a"]
    files("other/z.png")
    with pytest.raises(EbrError, match="none of its 2 files"):
        pair_folders(root / "in", root / "other", None, partial=True)


def test_folders_of_pictures_can_be_clips(files):
    root = files("in/walk/1.png", "in/walk/2.png", "in/walk/10.png", "gt/walk/1.png", "gt/walk/2.png", "gt/walk/10.png")
    assert [item.name for item in pair_folders(root / "in", root / "gt", None)] == ["walk/1", "walk/10", "walk/2"]
    (item,) = pair_folders(root / "in", root / "gt", None, clips=True)
    assert (item.name, item.source.clip, item.source.paths) == ("walk", True, (root / "in" / "walk",))
    files("in/walk/10.png", value=0.25)
    assert [round(float(frame.mean()), 1) for frame in item.source.frames()] == [0.5, 0.5, 0.3]
    assert len(list(item.source.frames(2))) == 2


def write_list(root, records, name="list.json"):
    (root / name).write_text(json.dumps(records))
    return root / name


def test_the_released_lists_are_read(files):
    root = files("d/Low/1.png", "d/GT/1.png", "d/Low/2.png", "d/GT/2.png")
    record = {"degradation": "LowLight", "dataset": "LOLv1", "category": "Real", "split": "Test", "no_reference": False}
    pairs = [{"image_path": f"d/Low/{i}.png", "target_path": f"d/GT/{i}.png", **record} for i in (1, 2)]
    items = read_list(write_list(root, pairs))
    assert told(items) == [(str(i), f"{root}/d/Low/{i}.png", f"{root}/d/GT/{i}.png", None) for i in (1, 2)]
    assert not items[0].source.clip


def test_the_released_lists_of_clips_are_read(files):
    frames = [f"{kind}/{clip}/fol/{i}.png" for kind in ("blur", "gt") for clip in ("c1", "c2") for i in (1, 2)]
    root = files(*frames)
    records = [
        {name: [f"{kind}/{clip}/fol/{i}.png" for i in (1, 2)] for name, kind in (("image_path", "blur"), ("target_path", "gt"))}
        for clip in ("c1", "c2")
    ]
    items = read_list(write_list(root, records))
    assert [item.name for item in items] == ["c1/fol", "c2/fol"]
    assert all(item.source.clip and len(item.source.paths) == len(item.target.paths) == 2 for item in items)


def test_a_target_that_is_the_input_is_none(files):
    root = files("a/1.png", "a/2.png", "b/1.png", "b/2.png")
    clip = ["a/1.png", "a/2.png"]
    records = [
        {"image_path": clip, "target_path": clip, "name": "same"},
        {"image_path": clip, "target_path": [], "name": "empty"},
        {"image_path": clip, "name": "absent"},
        {"image_path": clip, "target_path": ["b/1.png", "b/2.png"], "no_reference": True, "name": "told"},
        {"image_path": clip, "target_path": ["b/1.png", "b/2.png"], "name": "real"},
    ]
    items = read_list(write_list(root, records))
    assert [(item.name, item.target is not None) for item in items] == [
        *((name, False) for name in ("same", "empty", "absent", "told")),
        ("real", True),
    ]


def test_other_keys_lines_and_roots_are_read(files):
    root = files("data/x.png", "data/y.png", "results/x.png")
    (root / "list.jsonl").write_text('{"lq": "x.png", "gt": "y.png"}\n')
    (item,) = read_list(root / "list.jsonl", root / "data", root / "results")
    assert told([item]) == [("x", f"{root}/data/x.png", f"{root}/data/y.png", f"{root}/results/x.png")]


def test_results_of_clips_are_found_by_the_items_name(files):
    root = files("in/c/1.png", "in/c/2.png", "out/c/1.png", "out/c/2.png")
    file = write_list(root, [{"input": ["in/c/1.png", "in/c/2.png"]}])
    (item,) = read_list(file, restored=root / "out")
    assert (item.name, item.restored.clip, item.restored.paths) == ("c", True, (root / "out" / "c",))


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ({"a": 1}, ["list.json"]),
        ([], ["list.json", "JSON array"]),
        ([{"gt": "a.png"}], ["entry 1", "image_path"]),
        ([{"input": "a.png"}, {"input": "gone.png"}], ["entry 2", "gone.png", "--root"]),
        ([{"input": "a.png"}, {"input": "a.png"}], ["list.json", "same input"]),
        ([{"input": 3}], ["entry 1", "3"]),
        ([{"input": ["a.png", "b.png"], "gt": ["a.png"]}], ["entry 1", "2 input", "1 target"]),
        ([{"input": "a.png", "gt": ["b.png"]}], ["a.png", "picture", "clip"]),
    ],
)
def test_a_list_that_is_wrong_is_told(files, records, words):
    root = files("a.png", "b.png")
    with pytest.raises(EbrError) as error:
        read_list(write_list(root, records))
    for word in words:
        assert word in str(error.value)


def test_a_file_that_is_no_list_is_told(files):
    root = files()
    (root / "list.json").write_text("[1, 2")
    with pytest.raises(EbrError, match=r"list\.json: is no JSON list"):
        read_list(root / "list.json")
