"""What corrections of colour are worth: the quick form runs, and the defaults follow the measurement where they may."""

import json

from benchmarks import colour_fix


def test_the_quick_form_tells_of_every_way(tmp_path, capsys):
    colour_fix.main(["--quick", "--size", "64", "--json", str(tmp_path / "fix.json")])
    result = json.loads((tmp_path / "fix.json").read_text())
    assert [score["task"] for score in result["scores"]] == ["haze", "rain"]
    for score in result["scores"]:
        assert len({score[way] for way in ("none", "wavelet", "adain")}) == 3
    haze = result["scores"][0]
    assert abs(haze["wavelet"] - haze["input"]) < abs(haze["none"] - haze["input"])  # the haze is back
    assert "BY_TASK" in capsys.readouterr().out


def test_a_default_needs_a_gain_and_colours_that_are_no_damage():
    def score(task, none, wavelet, adain):
        return {"task": task, "photo": "x", "input": 0.0, "none": none, "wavelet": wavelet, "adain": adain}

    scores = [score("haze", 10, 20, 10), score("rain", 20, 20.01, 19), score("snow", 20, 20.5, 21), score("blur", 20, 19, 18)]
    assert colour_fix.best(scores) == {"haze": "none", "rain": "none", "snow": "adain", "blur": "none"}
