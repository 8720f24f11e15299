"""`ebr-engine bench` tells the stages, the rate and what is slow on one screen."""

from ebr_engine.cli.bench import slow


def test_a_small_picture_is_timed_on_one_screen(cli):
    code, out, _ = cli("bench", "--size", "32", "--runs", "1", "--precision", "fp32", "--device", "cpu", "--batch", "2")
    assert code == 0
    assert len(out.splitlines()) <= 24
    for word in ("2 x 32 x 32", "fp32 on cpu", "load", "bake", "encode", "denoise", "decode", "pictures/s", "TFLOP/s", "torch"):
        assert word in out


def test_what_is_slow_is_named():
    found = {"encode": 0.02, "denoise": 0.95, "decode": 0.02, "whole": 1.0}
    assert slow(found).startswith("95% of a picture's time is the transformer; fewer --steps")
    assert slow(found | {"denoise": 0.3, "decode": 0.6}) == "60% of a picture's time is decoding"


def test_a_task_that_is_not_there_is_told_in_one_line(cli):
    code, _, err = cli("bench", "--task", "fog", "--device", "cpu")
    assert (code, "unknown task 'fog'" in err) == (2, True)
