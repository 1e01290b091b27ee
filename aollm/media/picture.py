"""Pixels of a picture: of a file's bytes, of a Pillow image or of an array, as RGB and upright.

Sizes are checked before anything is decoded, and only formats with decoders of their own are tried: no other program is run.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np

from ..errors import RequestError
from .source import DAMAGE, content, refuse

SIDE_PIXELS, AREA_PIXELS = 16_384, 64 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
SCANS = 64
MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")  # those of JPEG that have a length; inside a scan there is none


def pixels(source: Any, files: bool) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of a Pillow image or of what `content` takes: turned as its EXIF says, transparency dropped."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise RequestError("images are decoded by Pillow, which is not installed: pip install 'aollm[images]'") from error
    data = b"" if isinstance(source, Image.Image) else content(source, "image", files)
    check_scans(data)
    try:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(data), formats=FORMATS)
        check_size(image.width, image.height)
        if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a camera's photo with a preview behind it
            raise RequestError(f"the image has {getattr(image, 'n_frames', 'several')} frames; send one of them, as an image of its own")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        refuse("the image is too large", error, f"make it smaller than {AREA_PIXELS} pixels")
    except DAMAGE as error:
        refuse("the image cannot be decoded", error, "send a whole PNG, JPEG, WebP, GIF, BMP or TIFF file")


def array_pixels(data: np.ndarray) -> np.ndarray:
    """Pixels uint8 [H, W, 3] of an array: one channel is grey, of four the last is dropped."""
    if data.dtype != np.uint8:
        raise RequestError(f"an image's array is uint8, 0 to 255, this one is {data.dtype}: scale and round it, then .astype('uint8')")
    if data.ndim == 2:
        data = data[..., None]
    if data.ndim != 3 or data.shape[2] not in (1, 3, 4):
        raise RequestError(f"an image's array is [H, W], [H, W, 3] or [H, W, 4], this one has shape {list(data.shape)}: put channels last")
    check_size(data.shape[1], data.shape[0])
    return np.repeat(data, 3, axis=2) if data.shape[2] == 1 else data[..., :3].copy()


def check_size(width: int, height: int) -> None:
    """Raise `RequestError` for an image that is empty, or too large to be decoded."""
    if not width or not height:
        raise RequestError(f"the image is empty, {width} × {height} pixels; send one that has some")
    if max(width, height) > SIDE_PIXELS or width * height > AREA_PIXELS:
        raise RequestError(
            f"the image has {width} × {height} pixels; at most {SIDE_PIXELS} a side and {AREA_PIXELS} in all are taken: make it smaller"
        )


def check_scans(data: bytes) -> None:
    """Raise `RequestError` for a JPEG that is painted over and over: each scan may cost as much as a whole picture."""
    count, at = 0, 2
    while data.startswith(b"\xff\xd8") and (marker := MARKER.search(data, at)) and marker[1] != b"\xd9":
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        count += marker[1] == b"\xda"
        if count > SCANS:
            raise RequestError(f"the JPEG has more than {SCANS} scans; save it again, as one that is not progressive")
