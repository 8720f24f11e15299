"""Procedural scenes with photo-like statistics: the material from which `mini` is pre-trained, made from nothing.

Opaque shapes with power-law sizes that hide one another explain most of what is universal in photographs: a 1/f²
power spectrum, heavy-tailed gradients, scale invariance. Real scenes add shading, texture, depth and focus, so each
leaf here carries them too. Sources, for the ideas (no code is copied):
Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 2001 (dead leaves, p(r) ∝ r⁻³);
Achddou, Gousseau, Ladjal, "Synthetic images as a regularity prior for image restoration", SSVM 2021, and "Fully
synthetic training for image restoration tasks", CVIU 2023 (dead leaves as a training set);
Achddou et al., "VibrantLeaves", 2024-25 (shapes, textures and depth of field).
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ebr_engine.training import patterns

KINDS = ("leaves", "polygons", "texture", "gradient", "lines", "landscape")
PALETTES = ("warm", "cool", "vivid", "muted", "dark", "bright", "green", "grey")
SCALES = ("fine", "medium", "coarse")
CAPTION_WORDS: tuple[str, ...] = KINDS + PALETTES + SCALES

KIND_ODDS = (0.28, 0.17, 0.13, 0.10, 0.12, 0.20)
PALETTE_ODDS = (0.15, 0.12, 0.12, 0.25, 0.10, 0.08, 0.12, 0.06)
# Odds of superellipses, blobs, polygons and boxes; how many times the leaves cover the picture; share with texture.
SHAPE_MIX = {
    "leaves": ((0.35, 0.4, 0.1, 0.15), 2.0, 0.5),
    "polygons": ((0.08, 0.07, 0.5, 0.35), 1.6, 0.35),
    "texture": ((0.2, 0.5, 0.2, 0.1), 0.7, 1.0),
    "gradient": ((0.4, 0.3, 0.15, 0.15), 0.35, 0.1),
    "lines": ((0.15, 0.15, 0.1, 0.6), 0.6, 0.4),
    "landscape": ((0.2, 0.65, 0.05, 0.1), 0.6, 0.7),
}
MAX_LEAVES = 300  # the cost of a scene is nearly proportional to it


@dataclass(frozen=True)
class Scene:
    """A clean image with its geometry and words.

    image [S, S, 3] uint8, sRGB; depth [S, S] float32 in [0, 1], 0 near, 1 far, in occlusion order; caption (kind,
    palette, scale), each in CAPTION_WORDS.
    """

    image: np.ndarray
    depth: np.ndarray
    caption: tuple[str, ...]


def render(seed: int, size: int = 256) -> Scene:
    """The scene numbered `seed`, `size` pixels square; the same on every call (about 40 ms at 256)."""
    if size < 32:
        raise ValueError(f"size is {size}; a scene needs at least 32 pixels a side")
    rng = np.random.default_rng((seed, size))
    kind = str(rng.choice(KINDS, p=KIND_ODDS))
    palette = str(rng.choice(PALETTES, p=PALETTE_ODDS))
    scale = str(rng.choice(SCALES))
    painter = _Painter(rng, size, palette)
    painter.background(kind)
    if kind == "landscape":
        painter.ridges()
    painter.leaves(kind, {"fine": 1.5, "medium": 3.0, "coarse": 6.0}[scale])
    if kind == "lines" or rng.random() < 0.25:
        painter.branches(int(rng.integers(2, 9 if kind == "lines" else 4)))
    if kind == "lines" or rng.random() < 0.1:
        painter.glyphs(1 + (kind == "lines"))
    image = _develop(painter, palette)
    depth = np.clip(painter.canvas[3], 0, 1)
    return Scene(image, depth, (kind, palette, scale))


class _Painter:
    """One scene being painted from far to near on `canvas` [4, S, S]: linear RGB and depth, blended together."""

    def __init__(self, rng: np.random.Generator, size: int, palette: str):
        self.rng, self.size = rng, size
        self.canvas = np.zeros((4, size, size), np.float32)
        self.colours = patterns.palette(rng, palette)
        angle = rng.uniform(0, 2 * np.pi)
        self.light = np.float32(np.cos(angle)), np.float32(-abs(np.sin(angle)))  # x, y: from above
        self.smooth = patterns.field(rng, size, 3.5)
        self.fields = [patterns.texture(rng, size) for _ in range(4)]
        self.depth_of_field = rng.random() < 0.3
        self.shadows = rng.uniform(0.2, 0.7) if rng.random() < 0.6 else 0.0
        row = np.linspace(0, 1, size, dtype=np.float32)[:, None]
        # A leaf's depth is a share of this ground, so a nearer leaf is nearer everywhere, ground slope included.
        horizon = rng.uniform(0.2, 0.7)
        near = rng.uniform(0.25, 0.8)
        self.ground = 1 - (1 - near) * np.clip((row - horizon) / (1 - horizon), 0, 1)
        self.ground = np.broadcast_to(self.ground.astype(np.float32), (size, size))

    def background(self, kind: str) -> None:
        """Sky: a vertical gradient with clouds; or, where no sky is likely, a surface with 1/f texture."""
        rng, row = self.rng, np.linspace(0, 1, self.size, dtype=np.float32)[None, :, None]
        top, bottom = self.colours[rng.integers(len(self.colours), size=2)][:, :, None, None]
        clouds = patterns.field(rng, self.size, rng.uniform(2.2, 3.2))
        if kind in ("landscape", "gradient") or rng.random() < 0.3:
            sky = np.array([0.35, 0.5, 0.8], np.float32) if rng.random() < 0.6 else top.ravel() / top.max()
            brightness = rng.uniform(0.4, 1.0)
            zenith = brightness * sky[:, None, None]
            haze = brightness * (0.4 * zenith / brightness + 0.6)
            cover = np.clip(rng.uniform(-1.0, 1.2) + clouds, 0, 1.5) * rng.uniform(0, 0.6)
            self.canvas[:3] = zenith + (haze - zenith) * row
            self.canvas[:3] += cover * (rng.uniform(0.6, 1.1) - self.canvas[:3])
        else:
            fine = self.fields[0] * rng.uniform(0, 0.35)
            self.canvas[:3] = (top + (bottom - top) * row) * np.exp(0.4 * clouds + fine)
        self.canvas[3] = self.ground

    def ridges(self) -> None:
        """Hills: fractal ridge lines from far to near; texture grows and contrast rises towards the viewer."""
        rng, size = self.rng, self.size
        count = int(rng.integers(2, 6))
        sky = self.canvas[:3].mean((1, 2))
        y = np.arange(size, dtype=np.float32)[:, None]
        for i in range(count):
            nearness = (i + 1) / count
            amplitude = size * rng.uniform(0.01, 0.09)
            roughness = rng.uniform(1.6, 2.8)
            line = size * (0.3 + 0.55 * nearness * rng.uniform(0.6, 1)) + amplitude * patterns.profile(rng, size, roughness)
            cover = np.clip(y - line[None] + 0.5, 0, 1)
            colour = self._colour(rng.uniform(), 0.3)
            colour += (0.6 * sky - colour) * 0.6 * (1 - nearness) ** 1.5
            texture = self.fields[rng.integers(len(self.fields))] * rng.uniform(0.15, 0.6) * nearness
            tone = np.exp(texture + 0.3 * self.smooth - 0.6 * np.clip((y - line[None]) / size, 0, 1))
            self._blend(slice(0, size), slice(0, size), cover, colour, tone, 0.95 - 0.7 * nearness)

    def leaves(self, kind: str, r_min: float) -> None:
        """Dead leaves with p(r) ∝ r⁻³ on [r_min, S/3], far first; `r_min` in pixels at size 256."""
        rng, size = self.rng, self.size
        mix, coverage, textured = SHAPE_MIX[kind]
        r_min, r_max = max(r_min * size / 256, 1.2), size / 3
        # E[πr²] of the truncated power law gives the number of leaves for a wanted coverage.
        area = 2 * np.pi * np.log(r_max / r_min) / (r_min**-2 - r_max**-2)
        count = int(np.clip(coverage * rng.uniform(0.6, 1.4) * size**2 / area, 8, MAX_LEAVES))
        radii = (r_min**-2 - rng.random(count) * (r_min**-2 - r_max**-2)) ** -0.5
        # A few hundred draws rarely hold the large surfaces that organise a photograph, so some are put in by hand.
        large = (rng.random(rng.integers(2, 9) if kind != "gradient" else 2) ** 2 * count).astype(int)
        radii[large] = rng.uniform(0.1, 0.4, len(large)) * size
        centres = rng.random((count, 2)) * size
        # Real things come in bunches: most small leaves gather around a few parents and share their colour.
        parent = rng.integers(0, max(count // 12, 1), count)
        bunched = (rng.random(count) < rng.uniform(0.2, 0.8)) & (radii < 0.1 * size)
        spread = rng.uniform(0.03, 0.12) * size
        centres[bunched] = centres[parent[bunched]] + spread * rng.standard_normal((int(bunched.sum()), 2))
        far = 0.95
        if kind == "landscape":
            far = 0.24  # in front of the last ridge
            centres[:, 0] = size * (0.35 + 0.65 * np.sqrt(np.clip(centres[:, 0] / size, 0, 1)))
        hue = np.where(bunched, parent * 0.618, rng.random(count)) + 0.05 * rng.standard_normal(count)
        shapes = rng.choice(4, count, p=mix)
        shapes[bunched] = shapes[parent[bunched]]
        kin = (rng.random(count) < rng.uniform(0.3, 0.9)) & ~bunched & (radii < 0.1 * size)
        contours = [[patterns.contour(rng, shape) for _ in range(6)] for shape in range(3)]
        focus = int(count * rng.uniform(0.2, 0.7)) if self.depth_of_field else -1
        upright = rng.random() < 0.6  # man-made things mostly stand straight
        for i in range(count):
            if i == focus:  # everything painted so far lies behind the plane in focus
                blur = rng.uniform(0.8, 3.0) * size / 256
                self.canvas[:3] = ndimage.gaussian_filter(self.canvas[:3], (0, blur, blur), truncate=2.5)
            soft = rng.uniform(2, 4) if rng.random() < 0.08 else 1.0
            share = far - (far - 0.1) * (i + 1) / count
            angle = rng.normal(0, 0.04) if upright and shapes[i] == 3 else rng.uniform(0, 2 * np.pi)
            if shapes[i] < 3:
                contour = contours[shapes[i]][rng.integers(6)]
                region = self._contour_distance(centres[i], radii[i], angle, contour)
            else:
                ratio = np.exp(rng.uniform(-2.5, 0))
                half = radii[i] * min(ratio**-0.5, 2.0), radii[i] * ratio**0.5
                region = self._box_distance(centres[i], half[:: 1 if rng.random() < 0.5 else -1], angle, 0.0, 0.0)
            if region is None:
                continue
            colour = self._colour(hue[i], 0.35)
            if kin[i]:  # a detail of the surface it lies on, rather than confetti
                y, x = np.clip(centres[i].astype(int), 0, size - 1)
                colour = 0.15 * colour + 0.85 * self.canvas[:3, y, x] * np.float32(np.exp(rng.normal(0, 0.4)))
            self._leaf(region, colour, share, soft, rng.random() < textured)

    def branches(self, count: int) -> None:
        """Thin, slightly bent strips, shaded as cylinders: branches, cables, poles."""
        rng, size = self.rng, self.size
        straight = rng.random() < 0.4
        angle = rng.uniform(0, np.pi)
        colour = self._colour(rng.random(), 0.2) * rng.choice([0.15, 0.5, 1.5])
        for i in range(count):
            half = size * rng.uniform(0.1, 0.6), np.exp(rng.uniform(-0.6, 1.6)) * size / 256
            bend = 0.0 if straight else rng.normal(0, 0.12)
            centre = rng.random(2) * size
            region = self._box_distance(centre, half, angle + rng.normal(0, 0.4), bend, rng.uniform(0, 0.7))
            if region is not None:
                self._leaf(region, colour * np.exp(rng.normal(0, 0.15)), 0.1 - 0.05 * i / count, 1.0, False)

    def glyphs(self, plates: int) -> None:
        """Rows of letter-like strokes, on a plate or straight on the scene."""
        rng, size = self.rng, self.size
        for plate in range(plates):
            height = rng.uniform(0.02, 0.06) * size
            columns, rows = int(rng.integers(3, 9)), int(rng.integers(1, 4))
            origin = rng.random(2) * size * 0.7
            angle = rng.normal(0, 0.08)
            along = np.array([np.sin(angle), np.cos(angle)])
            down = np.array([np.cos(angle), -np.sin(angle)])
            paper, ink = self._colour(rng.random(), 0.3) * 1.5 + 0.2, self._colour(rng.random(), 0.3) * 0.1
            if rng.random() < 0.4:
                paper, ink = ink, paper
            share = 0.045 - 0.02 * plate
            if rng.random() < 0.7:
                half = np.array([columns * 0.45, rows * 0.75]) * height + 0.3 * height
                centre = origin + along * (half[0] - 0.6 * height) + down * (half[1] - 0.9 * height)
                region = self._box_distance(centre, half, angle, 0.0, 0.0)
                if region is not None:
                    self._leaf(region, paper, share, 1.0, False)
            for cell in range(columns * rows):
                if rng.random() < 0.15:  # a space between words
                    continue
                corner = origin + along * (cell % columns) * 0.9 * height + down * (cell // columns) * 1.5 * height
                for _ in range(rng.integers(2, 4)):
                    turn = angle + rng.choice([0, np.pi / 2, np.pi / 2, rng.uniform(0, np.pi)])
                    centre = corner + rng.uniform(-0.25, 0.25, 2) * height
                    half = height * rng.uniform(0.2, 0.5), max(0.07 * height, 0.5)
                    region = self._box_distance(centre, half, turn, rng.choice([0, 0, 0.5]), 0.0)
                    if region is not None:
                        self._leaf(region, ink, share - 0.005, 1.0, False, shaded=False)

    def _colour(self, position: float, jitter: float) -> np.ndarray:
        """A palette colour [3], linear RGB, with log-normal luminance jitter."""
        colour = self.colours[int(position * len(self.colours)) % len(self.colours)]
        return colour * np.float32(np.exp(jitter * self.rng.standard_normal()))

    def _window(self, centre: np.ndarray, reach_y: float, reach_x: float):
        """Rows, columns, and coordinates relative to `centre` of a bounding box; None when out of the picture."""
        (cy, cx), size = centre, self.size
        y0, y1 = max(int(cy - reach_y) - 2, 0), min(int(cy + reach_y) + 4, size)
        x0, x1 = max(int(cx - reach_x) - 2, 0), min(int(cx + reach_x) + 4, size)
        if y1 - y0 < 1 or x1 - x0 < 1:
            return None
        y = (np.arange(y0, y1) - cy).astype(np.float32)[:, None]
        x = (np.arange(x0, x1) - cx).astype(np.float32)[None]
        return slice(y0, y1), slice(x0, x1), y, x

    def _contour_distance(self, centre: np.ndarray, radius: float, angle: float, contour: np.ndarray):
        """First-order signed distance (px) to a star-shaped contour, and the radius as a share of the contour's."""
        window = self._window(centre, radius, radius)
        if window is None:
            return None
        rows, columns, y, x = window
        rho = np.sqrt(y * y + x * x)
        index = ((np.arctan2(y, x) + np.float32(angle)) * np.float32(patterns.ANGLES / (2 * np.pi))).astype(np.int32)
        limit, cosine = contour.take(index & (patterns.ANGLES - 1), axis=1)
        limit *= np.float32(radius)
        return rows, columns, (rho - limit) * cosine, rho / limit, (x * self.light[0] + y * self.light[1]) / radius

    def _box_distance(self, centre: np.ndarray, half: tuple[float, float], angle: float, bend: float, taper: float):
        """Signed distance (px) to a turned box of half sides `half`, bent to a parabola and tapered along the first."""
        a, b = (np.float32(h) for h in half)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        across = b + abs(bend) * a
        window = self._window(centre, abs(sin) * a + abs(cos) * across, abs(cos) * a + abs(sin) * across)
        if window is None:
            return None
        rows, columns, y, x = window
        u = x * cos + y * sin
        v = y * cos - x * sin
        if bend:
            v = v - np.float32(bend) * (u * u / a - a / 3)
        width = b * (1 - np.float32(taper) * (0.5 + 0.5 * u / a)) if taper else b
        v = np.abs(v)
        distance = np.maximum(np.abs(u) - a, v - width)
        return rows, columns, distance, v / b, (x * self.light[0] + y * self.light[1]) / max(a, b)

    def _leaf(self, region, colour, share: float, soft: float, textured: bool, shaded: bool = True) -> None:
        """Shade, texture and blend one shape; its edge is `soft` pixels wide."""
        rows, columns, distance, inner, slope = region
        rng = self.rng
        cover = np.clip(0.5 - distance / np.float32(soft), 0, 1)
        height, width = cover.shape
        if self.shadows and shaded and min(height, width) > 6 and rng.random() < 0.5:
            self._shadow(rows, columns, distance)
        tone = np.float32(1)
        if shaded:
            dome = rng.uniform(0, 0.5) if rng.random() < 0.5 else 0.0
            tone = 1 + np.float32(rng.uniform(0, 0.45)) * slope
            if dome:
                tone = tone - np.float32(dome) * np.minimum(inner * inner, 1)
            tone = np.maximum(tone, np.float32(0.1))
        if textured and min(height, width) > 4:
            field = self.fields[rng.integers(len(self.fields))]
            oy, ox = rng.integers(0, self.size - height + 1), rng.integers(0, self.size - width + 1)
            pattern = field[oy : oy + height, ox : ox + width]
            if rng.random() < 0.15:
                pattern = patterns.stripes(rng, distance, slope, pattern, max(height, width))
            tone = tone * np.exp(np.float32(np.exp(rng.uniform(-2.7, -0.7))) * pattern)
            if rng.random() < 0.4:  # the texture leads from one colour of the palette to another
                other = self._colour(rng.random(), 0.2)
                mix = np.clip(0.4 + 0.4 * pattern, 0, 1)
                colour = colour[:, None, None] + (other - colour)[:, None, None] * mix
        self._blend(rows, columns, cover, colour, tone, share)

    def _shadow(self, rows: slice, columns: slice, distance: np.ndarray) -> None:
        """Darken what lies beside a leaf, on the side away from the light."""
        reach = self.rng.uniform(1, 6) * self.size / 256
        shift_x, shift_y = (round(float(-reach * c)) for c in self.light)
        x0, y0 = max(columns.start + shift_x, 0), max(rows.start + shift_y, 0)
        x1, y1 = min(columns.stop + shift_x, self.size), min(rows.stop + shift_y, self.size)
        if x1 <= x0 or y1 <= y0:
            return
        top, left = y0 - rows.start - shift_y, x0 - columns.start - shift_x
        inside = distance[top : top + y1 - y0, left : left + x1 - x0]
        # The penumbra grows inward only, so that the bounding box never cuts it.
        self.canvas[:3, y0:y1, x0:x1] *= 1 - np.float32(self.shadows) * np.clip(-inside / np.float32(reach), 0, 1)

    def _blend(self, rows: slice, columns: slice, cover, colour, tone, share: float) -> None:
        """Paint colour × tone over the canvas where `cover`, at `share` of the ground's depth."""
        target = self.canvas[:, rows, columns]
        fill = np.empty_like(target)
        fill[:3] = (colour if colour.ndim == 3 else colour[:, None, None]) * tone
        fill[3] = self.ground[rows, columns] * np.float32(share)
        fill -= target
        fill *= cover
        target += fill


def _develop(painter: _Painter, palette: str) -> np.ndarray:
    """From linear light to an sRGB photograph: illumination, lens blur, exposure to a wanted mean, contrast."""
    rng, light = painter.rng, painter.canvas[:3]
    light = light * np.exp(np.float32(rng.uniform(0, 0.35)) * painter.smooth)
    if rng.random() < 0.4:
        blur = rng.uniform(0.35, 0.8)
        light = ndimage.gaussian_filter(light, (0, blur, blur), truncate=3)
    code = np.clip(light, 1e-5, None) ** np.float32(1 / 2.2)
    luma = np.tensordot(patterns.LUMA, code[:, ::4, ::4], 1)
    low, high = np.percentile(luma, [rng.uniform(0.2, 3), 100 - rng.uniform(0.2, 3)])
    black, white = (0.0, 1.0) if rng.random() < 0.65 else (rng.uniform(0, 0.25), rng.uniform(0.6, 1.0))
    stretch = min((white - black) / max(high - low, 1e-3), 4.0)  # a nearly flat scene stays nearly flat
    target = rng.uniform(*{"dark": (0.2, 0.3), "bright": (0.6, 0.75)}.get(palette, (0.28, 0.6)))
    sample = np.clip((luma - low) * stretch, 1e-3, 1)
    gammas = np.geomspace(0.4, 2.5, 9)
    gamma = gammas[np.argmin([abs(black + (sample**g * (1 - black)).mean() - target) for g in gammas])]
    code = np.clip((code - np.float32(low)) * np.float32(stretch), 0, 1) ** np.float32(gamma)
    code = code * np.float32(1 - black) + np.float32(black)
    return np.rint(code * 255).astype(np.uint8).transpose(1, 2, 0).copy()
