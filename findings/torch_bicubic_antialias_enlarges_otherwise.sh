#!/bin/sh
# torch 2.13.0 and pillow 12.2.0, CPU. `antialias=True` is said to be for making pictures smaller. It also changes how bicubic makes
# them larger: the cubic's coefficient is -0.5 with it, as Pillow has it, and -0.75 without, as OpenCV has it. Bilinear enlarging is the
# same with and without. A model that learned with pictures enlarged one way meets others if it is served the other way.
. "$(dirname "$0")/run_with"
run_with torch==2.13.0 numpy==2.4.6 pillow==12.2.0 <<'PYTHON'
import numpy as np
import PIL
import torch
from PIL import Image
from torch.nn.functional import interpolate

SIDE, TIMES = 16, 2

print("torch", torch.__version__, "pillow", PIL.__version__)
picture = torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
differences = {}
for mode in ("bilinear", "bicubic"):
    plain, smooth = (interpolate(picture, scale_factor=TIMES, mode=mode, antialias=how) for how in (False, True))
    differences[mode] = (plain - smooth).abs().max().item()
    print(f"{mode}, {TIMES} times larger: with and without antialias differ by {differences[mode]:.2g} at most")
size = (SIDE * TIMES, SIDE * TIMES)
pillow = torch.from_numpy(np.array(Image.fromarray(picture[0, 0].numpy()).resize(size, Image.Resampling.BICUBIC)))
to_pillow = [(one[0, 0] - pillow).abs().max().item() for one in (plain, smooth)]
print(f"from Pillow's bicubic: without antialias {to_pillow[0]:.2g}, with it {to_pillow[1]:.2g}")

# Keys' cubic at 1.25 pixels from a single bright one is its coefficient times a polynomial.
point = torch.zeros(1, 1, 9, 9)
point[..., 4, 4] = 1
found, x = [], 1.25
for antialias in (False, True):
    line = interpolate(point, scale_factor=(1, TIMES), mode="bicubic", antialias=antialias)[0, 0, 4]
    found.append(line[6].item() / (x**3 - 5 * x**2 + 8 * x - 4))  # its place in the picture is 2.75, the bright one's is 4
print(f"coefficient of the cubic: without antialias {found[0]:.3f}, with it {found[1]:.3f}")
same = differences["bilinear"] < 1e-5 and to_pillow[1] < 1e-5
other = abs(found[0] + 0.75) < 1e-3 and abs(found[1] + 0.5) < 1e-3 and differences["bicubic"] > 0.01
if not (same and other):
    raise SystemExit("changed: bicubic enlarging no longer depends on antialias as it did")
PYTHON
