#!/bin/sh
# av 18.1.0 (FFmpeg's libx264). The same frames and settings give other bytes on a machine with another number of cores: PyAV
# sets slice threading where nothing is said, so x264 cuts every picture into one slice a core. More slices compress worse. Asking
# for one thread gives the same bytes everywhere. The process is bound to 1 and to 2 cores here (needs Linux and two cores).
. "$(dirname "$0")/run_with"
run_with av==18.1.0 numpy==2.4.6 <<'PYTHON'
import hashlib
import io
import os
import re
import subprocess
import sys

import av
import numpy as np


def encoded(threads):
    """Six moving frames as H.264."""
    file = io.BytesIO()
    with av.open(file, "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        if threads:
            stream.codec_context.thread_count = threads
        y, x = np.mgrid[0:240, 0:320]
        for i in range(6):
            grey = (127 + 80 * np.sin((x + 5 * i) / 17) * np.cos(y / 13)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="gray")))
        container.mux(stream.encode())
    return file.getvalue()


if len(sys.argv) > 1:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
    data = encoded(int(sys.argv[2]))
    slices = len(re.findall(rb"\x00\x00\x01[\x01\x21\x41\x61\x65]", data))  # NAL units of types 1 and 5
    print(hashlib.sha256(data).hexdigest()[:16], f"{len(data)} bytes, {slices} slices in 6 pictures")
    raise SystemExit
if len(os.sched_getaffinity(0)) < 2:
    raise SystemExit("needs two cores")
print("av", av.__version__)
found = {}
for cores in (1, 2):
    for threads in (0, 1):
        command = [sys.executable, __file__, str(cores), str(threads)]
        found[cores, threads] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        asked = f"{threads} thread asked for" if threads else "nothing said of threads"
        print(f"{cores} core(s), {asked}: {found[cores, threads]}")
if found[1, 0] == found[2, 0] or found[1, 1] != found[2, 1] or "12 slices" not in found[2, 0]:
    raise SystemExit("changed: bytes do not depend on cores as they did")
PYTHON
