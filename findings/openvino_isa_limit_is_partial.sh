#!/bin/sh
# openvino 2026.4.1. Its CPU plugin contains oneDNN, and ONEDNN_MAX_CPU_ISA=AVX2 holds oneDNN's products to AVX2; the plugin's own
# kernels (a layer norm, for one) take no notice and stay at AVX-512. So a comparison "at AVX2" by that variable is not quite one.
# The plugin's run-time model tells which kernel serves each operation (needs a CPU with AVX-512).
. "$(dirname "$0")/run_with"
run_with openvino==2026.4.1 numpy==2.4.6 <<'PYTHON'
import os
import subprocess
import sys
from pathlib import Path

if len(sys.argv) > 1:
    import numpy as np
    import openvino
    from openvino import opset13 as op

    x = op.parameter([1, 1024, 256], np.float32)
    normed = op.mvn(x, op.constant(np.array([2])), True, 1e-6, "INSIDE_SQRT")
    product = op.matmul(normed, op.constant(np.random.rand(256, 256).astype(np.float32)), False, True)
    model = openvino.Model([op.relu(product)], [x])
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for node in compiled.get_runtime_model().get_ops():
        about = node.get_rt_info()
        kind, kernel = (about[name].value for name in ("layerType", "primitiveType"))
        if kind in ("MVN", "FullyConnected"):
            print(kind, kernel)
    raise SystemExit
if "avx512f" not in Path("/proc/cpuinfo").read_text():
    raise SystemExit("needs a CPU with AVX-512")
print("openvino 2026.4.1")
found = {}
for name, limit in (("no limit", {}), ("ONEDNN_MAX_CPU_ISA=AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"})):
    done = subprocess.run([sys.executable, __file__, "x"], env=os.environ | limit, check=True, capture_output=True, text=True)
    found[name] = dict(line.split() for line in done.stdout.splitlines())
    print(f"{name}: {found[name]}")
limited = found["ONEDNN_MAX_CPU_ISA=AVX2"]
if "avx2" not in limited["FullyConnected"] or "avx512" not in limited["MVN"] or "avx512" not in found["no limit"]["FullyConnected"]:
    raise SystemExit("changed: the limit holds all kernels, or none")
PYTHON
