"""Outputs are decided as a whole and checked before any work: mirrored, never on an input, never twice."""

import os
from pathlib import Path

import pytest

from ebr_engine.jobs.files import plan_jobs
from ebr_engine.media.decoding import MediaError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A working folder with photos/{a.png, B.JPG, notes.txt, .hidden.png, sub/c.tif, .trash/d.png} and e.png."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "B.JPG", "notes.txt", ".hidden.png", "sub/c.tif", ".trash/d.png"):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Path("photos", name).write_bytes(b"x")
    Path("e.png").write_bytes(b"x")
    return tmp_path


def pairs(jobs):
    return {job.source.as_posix(): job.target.as_posix() for job in jobs}


def test_one_file_to_a_file_name(tree):
    assert pairs(plan_jobs([Path("e.png")], "new/name.webp")) == {"e.png": "new/name.webp"}


@pytest.mark.parametrize("out", ["out", "out/", "out.d/"])
def test_one_file_into_a_folder(tree, out):
    assert pairs(plan_jobs([Path("e.png")], out)) == {"e.png": f"{out.rstrip('/')}/e.png"}


def test_an_existing_folder_with_an_image_suffix_is_a_folder(tree):
    os.mkdir("odd.png")
    assert pairs(plan_jobs([Path("e.png")], "odd.png")) == {"e.png": "odd.png/e.png"}


def test_folders_are_mirrored_and_mixed_with_files(tree):
    assert pairs(plan_jobs([Path("photos"), Path("e.png")], "out")) == {
        "photos/B.JPG": "out/B.JPG",
        "photos/a.png": "out/a.png",
        "photos/sub/c.tif": "out/sub/c.tif",
        "e.png": "out/e.png",
    }


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos/*.png", {"photos/a.png": "out/a.png"}),
        ("photos/**/*.tif", {"photos/sub/c.tif": "out/sub/c.tif"}),
        ("photos/**", {"photos/B.JPG": "out/B.JPG", "photos/a.png": "out/a.png", "photos/sub/c.tif": "out/sub/c.tif"}),
        ("*/s?b/[abc].tif", {"photos/sub/c.tif": "out/photos/sub/c.tif"}),
        ("*.png", {"e.png": "out/e.png"}),
    ],
)
def test_patterns_are_mirrored_below_their_fixed_part(tree, pattern, expected):
    assert pairs(plan_jobs([Path(pattern)], "out")) == expected
    assert pairs(plan_jobs([tree / pattern], "out")) == {str(tree / source): target for source, target in expected.items()}


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tree):
    Path("a[1].png").write_bytes(b"x")
    assert pairs(plan_jobs([Path("a[1].png")], "x.png")) == {"a[1].png": "x.png"}
    refused(["a[2].png"], "out", "a[2].png", "no picture or clip matches")


def test_outputs_inside_the_input_folder_are_not_inputs(tree):
    os.makedirs("photos/done")
    Path("photos/done/old.png").write_bytes(b"x")
    assert all("done" not in source for source in pairs(plan_jobs([Path("photos")], "photos/done")))


def test_comparisons_are_planned_beside_the_output(tree):
    (job,) = plan_jobs([Path("e.png")], "out/r.jpg", compare=True)
    assert job.outputs == (Path("out/r.jpg"), Path("out/r_compare.png"))


def test_planning_creates_nothing(tree):
    before = sorted(tree.rglob("*"))
    plan_jobs([Path("photos")], "deep/er/out", compare=True)
    assert sorted(tree.rglob("*")) == before


def refused(inputs, out, *words, **options):
    with pytest.raises(MediaError) as caught:
        plan_jobs([Path(item) for item in inputs], out, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_missing_and_empty_inputs_are_refused(tree):
    refused(["e.png", "nope.png"], "out", "nope.png", "no such file")
    os.mkdir("bare")
    refused(["bare"], "out", "bare", "no pictures")


def test_a_file_name_for_many_is_refused(tree):
    refused(["photos"], "out.png", "folder")
    refused(["e.png", "photos/a.png"], "out.png", "folder")


def test_unsupported_outputs_are_refused(tree):
    refused(["e.png"], "out.bmp", "cannot write .bmp")
    Path("x.bmp").write_bytes(b"x")
    refused(["x.bmp"], "out", "cannot write .bmp")
    assert pairs(plan_jobs([Path("x.bmp")], "x.png")) == {"x.bmp": "x.png"}


def test_an_input_is_never_overwritten(tree):
    for overwrite in (False, True):
        refused(["e.png"], "e.png", "is an input", overwrite=overwrite)
        refused(["photos"], "photos", "is an input", overwrite=overwrite)
        refused(["e.png"], ".", "is an input", overwrite=overwrite)
        refused(["e.png"], "photos/../e.png", "is an input", overwrite=overwrite)


def test_an_input_is_never_overwritten_through_links(tree):
    os.symlink("e.png", "soft.png")
    os.link("e.png", "hard.png")
    os.symlink(".", "here")
    refused(["e.png"], "soft.png", "is an input", overwrite=True)
    refused(["soft.png"], "e.png", "is an input", overwrite=True)
    refused(["e.png"], "hard.png", "is an input", overwrite=True)
    refused(["e.png"], "here", "is an input", overwrite=True)


def test_a_comparison_never_overwrites_an_input(tree):
    os.makedirs("o")
    Path("o/e_compare.png").write_bytes(b"x")
    refused(["e.png", "o/e_compare.png"], "o", "is an input", compare=True, overwrite=True)


def test_existing_outputs_need_overwrite(tree):
    os.makedirs("out")
    Path("out/a.png").write_bytes(b"old")
    Path("out/B.JPG").write_bytes(b"old")
    refused(["photos"], "out", "exists (and 1 more)", "--overwrite")
    assert len(plan_jobs([Path("photos")], "out", overwrite=True)) == 3
    os.makedirs("dir/e.png")
    refused(["e.png"], "dir", "is a folder", overwrite=True)


def test_two_inputs_with_one_output_are_refused(tree):
    Path("sub").mkdir()
    Path("sub/e.png").write_bytes(b"x")
    refused(["e.png", "sub/e.png"], "out", "e.png and sub/e.png", "both")
    refused(["e.png", "e.png"], "out", "both")
    Path("e.jpg").write_bytes(b"x")
    assert len(plan_jobs([Path("e.png"), Path("e.jpg")], "out")) == 2
    refused(["e.png", "e.jpg"], "out", "e_compare.png", compare=True)


def test_an_output_folder_that_cannot_be_written_is_refused(tree):
    refused(["e.png"], "photos/a.png/out/", "photos/a.png", "cannot write")
    if os.path.isdir("/proc/self"):
        refused(["e.png"], "/proc/self/out/", "/proc/self", "cannot write")


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_loops_of_links_end(tree):
    os.symlink("..", "photos/sub/up")
    os.symlink("loop.png", "loop.png")
    assert len(plan_jobs([Path("photos")], "out")) == 3
    assert len(plan_jobs([Path("photos/**/*")], "out")) == 3
    refused(["loop.png"], "out", "loop.png")
