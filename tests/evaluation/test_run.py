"""Measuring many files: given results and fresh ones, clips, targets that are missing, resuming, several processes."""

import csv
import json
import math
from dataclasses import replace
from queue import Queue

import numpy as np
import pytest
import torch

from ebr_engine.backbones.wan import spec as wan
from ebr_engine.engine.restorer import Restorer
from ebr_engine.errors import EbrError
from ebr_engine.evaluation import metrics, run
from ebr_engine.evaluation.metrics import psnr, ssim
from ebr_engine.evaluation.paired import Item, Media, pair_folders
from ebr_engine.evaluation.protocols import as_frame
from ebr_engine.evaluation.run import Measurer, Restoring, Settings, evaluate, means
from ebr_engine.evaluation.summary import notes, score_table, write_summary
from ebr_engine.media.images import read_image, write_image
from ebr_engine.media.picture import Picture
from ebr_engine.request import RestoreRequest

GIVEN = Settings("native", ("psnr", "ssim"))
RESTORED = Settings("native", ("psnr", "ssim"), Restoring(RestoreRequest(task="haze", precision="fp32", steps=1)))


@pytest.fixture
def folder(tmp_path):
    """Three noisy pictures of odd sizes, one of them grey and one of 16 bit, and their targets."""
    generator = np.random.default_rng(3)
    for name, size, form in (("a", (17, 24), {}), ("b", (24, 31), {"bits": 16}), ("c", (16, 16), {"grey": True})):
        target = generator.random((*size, 3), np.float32)
        target = target.mean(-1, keepdims=True).repeat(3, -1) if "grey" in form else target
        for role, pixels in (("in", np.clip(target + 0.1, 0, 1)), ("gt", target)):
            (tmp_path / role).mkdir(exist_ok=True)
            write_image(tmp_path / role / f"{name}.png", Picture(pixels, **form))
    return tmp_path


def items_of(folder, restored="in"):
    return pair_folders(folder / "in", folder / "gt", restored and folder / restored)


def tensor(path):
    return as_frame(read_image(path).pixels)


def test_given_results_are_measured_as_they_are(folder, tmp_path):
    rows = evaluate(items_of(folder), GIVEN, tmp_path / "out")
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    for row in rows:
        result, target = (tensor(folder / role / f"{row['name']}.png") for role in ("in", "gt"))
        assert row["scores"] == {"psnr": psnr(result, target), "ssim": ssim(result, target)}
        assert (row["frames"], row["height"], row["width"]) == (1, *result.shape[-2:])
    assert read_image(folder / "in" / "b.png").bits == 16


def test_transparent_files_are_told_not_measured(folder, tmp_path):
    picture = read_image(folder / "gt" / "a.png")
    alpha = np.ones(picture.pixels.shape[:2], np.float32)
    write_image(folder / "gt" / "a.png", Picture(picture.pixels, alpha=alpha))
    assert "error" not in evaluate(items_of(folder), GIVEN, tmp_path / "out")[0]  # nothing is hidden
    alpha[:3] = 0
    write_image(folder / "gt" / "a.png", Picture(picture.pixels, alpha=alpha))
    first, *others = evaluate(items_of(folder), GIVEN, tmp_path / "out")
    assert "a.png: is transparent in parts" in first["error"]
    assert all("scores" in row for row in others)


@pytest.mark.parametrize("name", ["a", "b"])
def test_files_are_restored_and_measured_as_a_file_would_hold_them(folder, name):
    (item,) = (item for item in items_of(folder, None) if item.name == name)
    row = Measurer(RESTORED, "cpu").measure(item)
    restorer = Restorer(device="cpu", precision="fp32")
    restored = restorer.restore(tensor(folder / "in" / f"{name}.png"), task="haze", steps=1)
    peak = 65535 if name == "b" else 255
    assert row["scores"]["psnr"] == pytest.approx(psnr((restored * peak).round() / peak, tensor(folder / "gt" / f"{name}.png")))


def clip(folder, name, frames, size=(16, 24)):
    generator = np.random.default_rng(len(name))
    for index in range(frames):
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_image(folder / name / f"{index}.png", Picture(generator.random((*size, 3), np.float32)))
    return Media((folder / name,), clip=True)


def test_a_clips_score_is_the_mean_of_its_frames(tmp_path):
    result, target = clip(tmp_path, "result", 3), clip(tmp_path, "target1", 3)
    row = Measurer(GIVEN, "cpu").measure(Item("c", None, target, result))
    pairs = [[tensor(path / f"{i}.png") for path in (result.paths[0], target.paths[0])] for i in range(3)]
    assert row["frames"] == 3
    assert row["scores"]["psnr"] == pytest.approx(sum(psnr(*pair) for pair in pairs) / 3)


@pytest.mark.parametrize("protocol", ["native", "released"])
def test_clips_are_restored_frame_by_frame_by_a_backbone_without_time(tmp_path, protocol, monkeypatch):
    monkeypatch.setattr(wan, "SPEC", replace(wan.SPEC, released_size=(16, 24)))
    monkeypatch.setitem(run.protocol_for.__globals__, "METRIC_SIDE", 16)
    monkeypatch.setitem(run.protocol_for.__globals__, "RELEASED_FRAMES", 2)
    source, target = clip(tmp_path, "source", 5), clip(tmp_path, "target1", 5)
    settings = Settings(protocol, ("psnr",), RESTORED.restoring)
    row = Measurer(settings, "cpu").measure(Item("c", source, target))
    assert row["frames"] == (2 if protocol == "released" else 5)
    restorer, plan = settings.restoring.load("cpu")
    expected = []
    for index in range(row["frames"]):
        restored = restorer.run(tensor(source.paths[0] / f"{index}.png")[:, :, None], plan)[:, :, 0]  # as a clip's frame
        wanted = tensor(target.paths[0] / f"{index}.png")
        if protocol == "native":
            restored = (restored * 255).round() / 255
        chosen = settings.protocol_of(Item("c", source, target))
        expected.append(psnr(chosen.compared(restored), chosen.compared(wanted)))
    assert row["scores"]["psnr"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_without_a_target_there_is_no_score_that_needs_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_pyiqa", lambda name, device: lambda *pictures: float(len(pictures)))
    items = [Item(item.name, item.source, item.target if item.name == "a" else None, item.restored) for item in items_of(folder)]
    settings = Settings("native", ("psnr", "dists", "musiq"))
    rows = evaluate(items, settings, tmp_path / "out")
    assert [set(row["scores"]) for row in rows] == [{"psnr", "dists", "musiq"}, {"musiq"}, {"musiq"}]
    assert means(rows, settings.metrics)["psnr"] == {"mean": rows[0]["scores"]["psnr"], "files": 1}
    assert "2 of 3 file(s) have no target" in notes(rows, settings.metrics)[0]
    write_summary(tmp_path / "out", rows, settings.metrics, {"protocol": "native"})
    lines = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert [line["psnr"] == "" for line in lines] == [False, True, True]


def test_nothing_is_restored_for_no_score(folder, monkeypatch):
    measurer = Measurer(RESTORED, "cpu")
    monkeypatch.setattr(measurer, "restorer", None)
    (item, *_) = items_of(folder, None)
    assert measurer.measure(Item(item.name, item.source, None))["scores"] == {}


@pytest.mark.parametrize(("shape", "words"), [((17, 25), ["a.png", "25 x 17", "24 x 17"]), (None, ["a.png", "empty"])])
def test_a_file_that_cannot_be_measured_is_named_and_the_others_go_on(folder, tmp_path, shape, words):
    bad = folder / "gt" / "a.png"
    bad.write_bytes(b"") if shape is None else write_image(bad, np.zeros((*shape, 3), np.float32))
    rows = evaluate(items_of(folder), GIVEN, tmp_path / "out")
    assert ["error" in row for row in rows] == [True, False, False]
    for word in words:
        assert word in rows[0]["error"]
    assert "1 of 3 file(s) could not be measured" in notes(rows, GIVEN.metrics)[0]


def test_a_clip_that_is_shorter_than_its_target_is_named(tmp_path):
    result, target = clip(tmp_path, "result", 2), clip(tmp_path, "target1", 3)
    with pytest.raises(EbrError, match=r"result: has 2 frame"):
        Measurer(GIVEN, "cpu").measure(Item("c", None, target, result))


def test_a_run_goes_on_where_it_stopped(folder, tmp_path):
    out, heard = tmp_path / "out", []

    class Stop(Exception):
        pass

    def stop(row):
        raise Stop

    with pytest.raises(Stop):
        evaluate(items_of(folder), GIVEN, out, callback=stop)
    with (out / "rows.jsonl").open("a") as journal:
        journal.write('{"name": "b", "sco')  # cut short while writing
    rows = evaluate(items_of(folder), GIVEN, out, callback=lambda row: heard.append(row["name"]))
    assert heard == ["b", "c"]
    fresh = evaluate(items_of(folder), GIVEN, tmp_path / "other")
    assert [row["scores"] for row in rows] == [row["scores"] for row in fresh]


def test_rows_of_files_that_changed_and_of_other_settings_are_not_kept(folder, tmp_path):
    out, heard = tmp_path / "out", []
    evaluate(items_of(folder), GIVEN, out)
    write_image(folder / "in" / "b.png", np.zeros((24, 31, 3), np.float32))
    evaluate(items_of(folder), GIVEN, out, callback=lambda row: heard.append(row["name"]))
    assert heard == ["b"]
    other = Settings("y-channel", ("psnr",))
    with pytest.raises(EbrError, match=r"out holds scores of other settings \(protocol, metrics\).*--no-resume"):
        evaluate(items_of(folder), other, out)
    evaluate(items_of(folder), other, out, resume=False, callback=lambda row: heard.append(row["name"]))
    assert heard == ["b", "a", "b", "c"]


def test_scores_do_not_depend_on_the_number_of_processes(folder, tmp_path):
    one = evaluate(items_of(folder), GIVEN, tmp_path / "one")
    two = evaluate(items_of(folder), GIVEN, tmp_path / "two", workers=2)
    assert [row["scores"] for row in two] == [row["scores"] for row in one]


def test_a_process_tells_what_it_cannot_load(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    rows = Queue()
    run._work(Queue(), rows, Settings("native", ("psnr",), Restoring(RestoreRequest(task="fog"))), "cpu", 1)
    assert "unknown task 'fog'" in rows.get_nowait()["fatal"]


def test_the_summary_tells_means_and_protocol(tmp_path):
    rows = [
        {"name": "a", "frames": 1, "height": 4, "width": 6, "scores": {"psnr": 20.0, "ssim": 0.5}},
        {"name": "b", "frames": 2, "height": 4, "width": 6, "scores": {"psnr": 30.0, "ssim": 0.75}},
        {"name": "c", "error": "c.png: gone"},
    ]
    assert score_table(rows, ("psnr", "ssim")).markdown().splitlines()[2:] == [
        "| PSNR in dB | higher | 25.00 | 2 |",
        "| SSIM | higher | 0.6250 | 2 |",
    ]
    write_summary(tmp_path, rows, ("psnr", "ssim"), {"protocol": "native: own size"})
    assert (tmp_path / "scores.csv").read_text().splitlines() == [
        "name,frames,width,height,psnr,ssim,error",
        "a,1,6,4,20.0000,0.500000,",
        "b,2,6,4,30.0000,0.750000,",
        "c,,,,,,c.png: gone",
    ]
    text, summary = (tmp_path / "summary.md").read_text(), json.loads((tmp_path / "summary.json").read_text())
    for word in ("protocol: native: own size", "| 25.00 | 2 |", "1 of 3 file(s) could not", "c.png: gone"):
        assert word in text
    assert summary["means"]["psnr"] == {"mean": 25.0, "files": 2}


def test_an_infinite_psnr_is_told_as_such(tmp_path):
    rows = [{"name": "a", "frames": 1, "height": 4, "width": 6, "scores": {"psnr": math.inf}}]
    write_summary(tmp_path, rows, ("psnr",), {})
    assert json.loads((tmp_path / "summary.json").read_text())["means"]["psnr"]["mean"] == "inf"
    assert "a,1,6,4,inf," in (tmp_path / "scores.csv").read_text()
