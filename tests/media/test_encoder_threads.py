"""Encoders' threads are scheduled as all others are."""

import os
from fractions import Fraction

import numpy as np
import pytest

from ebr_engine.media.video import VideoInfo, write_video


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="needs a scheduler to ask")
def test_no_encoder_takes_real_time(tmp_path):
    def real_time():  # threads of this process that come before all ordinary ones
        threads = map(int, os.listdir("/proc/self/task"))
        return {thread for thread in threads if os.sched_getscheduler(thread) != os.SCHED_OTHER}

    before = real_time()
    info = VideoInfo(64, 64, Fraction(24), Fraction(1, 24))
    with write_video(tmp_path / "out.mkv", info, codec="libsvtav1") as writer:
        writer.write(np.zeros((64, 64, 3), np.float32))
        assert real_time() == before
    assert real_time() == before
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
