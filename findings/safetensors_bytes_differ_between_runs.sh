#!/bin/sh
# safetensors 0.8.0. Saving the same tensors with the same metadata gives other bytes every time, even within one process: the
# entries of the metadata are written in a random order (a hash map's), the tensors in a fixed one. So a file's checksum says
# nothing of its content; with one entry, or none, bytes are equal.
. "$(dirname "$0")/run_with"
run_with safetensors==0.8.0 numpy==2.4.6 <<'PYTHON'
import hashlib
import json

import numpy as np
import safetensors
from safetensors.numpy import load, save

print("safetensors", safetensors.__version__)
tensors = {"b": np.arange(4.0), "a": np.zeros(3)}
counts = {}
for entries in (0, 1, 6):
    metadata = {f"key {i}": "value" for i in range(entries)}
    files = [save(tensors, metadata) for _ in range(20)]
    counts[entries] = len({hashlib.sha256(file).hexdigest() for file in files})
    print(f"{entries} entries of metadata, saved 20 times: {counts[entries]} different files")
for file in files[:3]:
    print("  order of entries:", list(json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["__metadata__"]))
assert all(np.array_equal(load(file)["b"], tensors["b"]) for file in files)
if counts[0] != 1 or counts[1] != 1 or counts[6] < 2:
    raise SystemExit("changed: metadata is written in one order")
PYTHON
