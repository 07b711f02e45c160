"""Thumbnails as few sprite sheets in data URIs, as fine as the room in the file allows."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np

from ..previews import as_images, shrink

_ROW, _SHEET = 32, 1024  # tiles in a row and in a sheet: a sheet of 64 pixel tiles is 2048 x 2048
_LADDER = ((64, None), (64, 70), (48, 60), (32, 55), (32, 30), (24, 30), (16, 25))  # longest side, quality; None: PNG


def sprites(inputs: np.ndarray | None, room: int, order: np.ndarray | None = None) -> dict[str, Any] | None:
    """Thumbnails of all samples, or, where no quality fits, of the first ones of ``order``.

    Args:
        inputs: as ``previews.as_images`` takes them. room: bytes. order: samples, those that matter most first.
    Returns:
        {"width", "height" of a tile, "row", "sheet": tiles in a row and in a sheet, "sheets": data URIs,
        "place": tile of each sample (-1: none), or None where tile i is sample i}; None where inputs are no pictures.
    """
    images = as_images(inputs)
    if images is None:
        return None
    few = images[np.unique(np.linspace(0, len(images) - 1, 256).astype(int))]
    size = 0.0
    for largest, quality in _LADDER:
        small = shrink(few, largest)
        size = len(_encode(_sheet(small), quality)) / len(few)
        if size * len(images) < 0.9 * room:
            found = _all(shrink(images, largest), quality)
            if sum(map(len, found["sheets"])) <= room:
                return {**found, "place": None}
    count = int(0.8 * room / max(size, 1.0))
    if count < 1:
        return None
    chosen = np.sort((np.arange(len(images)) if order is None else order)[:count])
    place = np.full(len(images), -1)
    place[chosen] = np.arange(len(chosen))
    return {**_all(shrink(images[chosen], largest), quality), "place": place.tolist()}


def _all(images: np.ndarray, quality: int | None) -> dict[str, Any]:
    height, width = images.shape[1:3]
    sheets = [_encode(_sheet(images[i : i + _SHEET]), quality) for i in range(0, len(images), _SHEET)]
    return {"width": width, "height": height, "row": _ROW, "sheet": _SHEET, "sheets": sheets}


def _sheet(images: np.ndarray) -> np.ndarray:
    """Tiles [n, h, w, c] side by side, ``_ROW`` in a row."""
    n, height, width, channels = images.shape
    rows = -(-n // _ROW)
    sheet = np.zeros((rows * _ROW, height, width, channels), dtype=np.uint8)
    sheet[:n] = images
    tiles = sheet.reshape(rows, _ROW, height, width, channels).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(rows * height, _ROW * width, channels)


def _encode(image: np.ndarray, quality: int | None) -> str:
    """A data URI: PNG, or the smaller of WebP and JPEG that Pillow has; PNG without Pillow."""
    if quality is None:
        return png(image)
    try:
        from PIL import Image, features
    except ImportError:
        return png(image)
    kind = "webp" if features.check("webp") else "jpeg"
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, kind, quality=quality)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def png(image: np.ndarray) -> str:
    """A picture uint8 [h, w, c], c = 1 or 3, as a PNG data URI."""
    height, width, channels = image.shape
    raw = np.zeros((height, 1 + width * channels), dtype=np.uint8)
    raw[:, 1:] = image.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw.tobytes(), 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()
