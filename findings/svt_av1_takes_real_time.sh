#!/bin/sh
# av 18.1.0 (FFmpeg 8 with SVT-AV1). Opened by root, `libsvtav1` puts every thread that it makes, and the thread that opens it, under
# SCHED_FIFO with the highest priority, 99. The caller keeps it when the encoder is closed, and hands it on to every thread and process
# that it begins: a server, or a test run, that has once written AV1 comes before all other work of the machine from then on, and what
# waits by spinning for an ordinary thread on the same core waits for ever. x264, x265 and libvpx leave threads as they are.
# `os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))`, for each thread of /proc/self/task, puts it right.
. "$(dirname "$0")/run_with"
run_with av==18.1.0 numpy==2.4.6 <<'PYTHON'
import io
import os
import subprocess
import sys
import threading

import av
import numpy as np

if os.geteuid() or not hasattr(os, "sched_setscheduler"):
    raise SystemExit("this shows on Linux, as root, alone")
os.environ["SVT_LOG"] = "1"
ORDINARY, HIGHEST = (os.SCHED_OTHER, 0), (os.SCHED_FIFO, 99)
CHILD = "import os; print(os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)"


def scheduled(thread=0):
    return os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority


def encoded(encoder, found):
    """Writes two frames; how this thread is scheduled before, after, the encoder's own threads, and a process begun after it."""
    found["before"] = scheduled()
    others = set(os.listdir("/proc/self/task"))
    with av.open(io.BytesIO(), "w", format="matroska") as container:
        stream = container.add_stream(encoder, rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.open()
        own = set(os.listdir("/proc/self/task")) - others
        found["its threads"] = {scheduled(int(thread)) for thread in own}
        for frame in (av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8)), None):
            container.mux(stream.encode(frame))
    found["after"] = scheduled()
    found["child"] = tuple(map(int, subprocess.check_output([sys.executable, "-c", CHILD], text=True).split()))


print("av", av.__version__, "FFmpeg", av.ffmpeg_version_info)
seen = {}
for encoder in ("libx264", "libx265", "libvpx-vp9", "libsvtav1"):
    thread = threading.Thread(target=encoded, args=(encoder, seen.setdefault(encoder, {})))
    thread.start()
    thread.join()
    print(encoder, seen[encoder])
plain = all(each["after"] == each["child"] == ORDINARY and HIGHEST not in each["its threads"] for name, each in seen.items() if name != "libsvtav1")
av1 = seen["libsvtav1"]
if not (plain and av1["before"] == ORDINARY and av1["after"] == av1["child"] == HIGHEST and av1["its threads"] == {HIGHEST}):
    raise SystemExit("changed: SVT-AV1 leaves its caller as it was, or others do not")
PYTHON
