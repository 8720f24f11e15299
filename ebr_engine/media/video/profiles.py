"""Pictures with a colour profile become frames of a video, which has none: converted to sRGB by libvips."""

import numpy as np

from ebr_engine.media.decoding import MediaError


def to_srgb(pixels: np.ndarray, icc: bytes) -> np.ndarray:
    """[H, W, 3] in [0, 1] in the space of an RGB or grey profile, as sRGB. MediaError for a profile that does not fit."""
    from ebr_engine.media.decoding import vips as library

    vips = library()
    height, width = pixels.shape[:2]
    grey = icc[16:20] == b"GRAY"
    stored = np.rint(np.clip(pixels[..., :1] if grey else pixels, 0, 1) * 65535).astype(np.uint16)
    image = vips.Image.new_from_memory(stored.tobytes(), width, height, stored.shape[2], "ushort")
    image = image.copy(interpretation="grey16" if grey else "rgb16")
    image.set_type(vips.GValue.blob_type, "icc-profile-data", icc)
    try:
        made = image.icc_transform("srgb", embedded=True, depth=16, intent="relative", black_point_compensation=True).numpy()
    except vips.Error as error:
        raise MediaError("a frame's colour profile is damaged, or not one of RGB or grey; remove it from the frames") from error
    return np.broadcast_to(made.reshape(height, width, -1), (height, width, 3)).astype(np.float32) / np.float32(65535)
