"""Small pictures of inputs: what a report shows of a sample, and what a score file keeps of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

LARGEST = 64  # pixels of the longer side
_CHANNELS = (1, 3, 4)
_MOST_NUMBERS = 256  # of an input that is not a picture
_MOST_BYTES = 1 << 26  # of all inputs in a file
_KEY = b"sui_fast.extra"
_FIELDS = {"input": "inputs", "text": "texts"}  # column of the file: argument of Scores


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(height, width, channels) of one sample where it can be a picture: [h, w], [c, h, w] or [h, w, c]; else None."""
    if len(shape) == 2:
        found = (*shape, 1)
    elif channels_first(shape):
        found = (shape[1], shape[2], shape[0])
    elif len(shape) == 3 and shape[2] in _CHANNELS:
        found = shape
    else:
        return None
    return found if min(found[:2]) >= 2 and max(found[:2]) <= 4096 else None


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether one sample is [c, h, w]; where both ends could be channels, one or three of them at the front win."""
    return len(shape) == 3 and shape[0] in _CHANNELS and (shape[0] < 4 or shape[2] not in _CHANNELS)


def as_images(inputs: np.ndarray | None, largest: int = LARGEST) -> np.ndarray | None:
    """Pictures of the inputs, or None where they are none.

    Args:
        inputs: [n, h, w], [n, c, h, w] or [n, h, w, c] with c = 1, 3 or 4 (the fourth is dropped); uint8 and numbers
            that fill 0 .. 1 or 0 .. 255 are taken as they are, others are stretched between the 0.1% and 99.9%
            quantile of each channel.
        largest: pixels of the longer side; larger pictures are averaged down.
    Returns:
        uint8 [n, h, w, c], c = 1 or 3.
    """
    if inputs is None or not len(inputs) or image_shape(inputs.shape[1:]) is None:
        return None
    images = inputs[..., None] if inputs.ndim == 3 else inputs
    if channels_first(inputs.shape[1:]):
        images = images.transpose(0, 2, 3, 1)
    images = shrink(images[..., :3], largest)
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    few = images[:: max(1, len(images) // 2000)].reshape(-1, images.shape[-1]).astype(np.float64)
    few = np.where(np.isfinite(few), few, 0.0)
    low, high = np.quantile(few, 0.001, axis=0), np.quantile(few, 0.999, axis=0)
    flat = high - low < 1e-12 * np.maximum(np.abs(high), 1e-300)  # an almost constant channel: its full range
    low, high = np.where(flat, few.min(0), low), np.where(flat, few.max(0), high)
    for top in (1.0, 255.0):
        if few.min() >= 0 and 0.5 * top < few.max() <= top:
            low, high = np.zeros_like(low), np.full_like(high, top)
    scale = 255 / np.where(high > low, high - low, 1.0)
    with np.errstate(invalid="ignore"):
        stretched = np.clip((images - low) * scale + 0.5, 0, 255)
    return np.ascontiguousarray(np.where(np.isfinite(stretched), stretched, 0).astype(np.uint8))


def shrink(images: np.ndarray, largest: int) -> np.ndarray:
    """Pictures [n, h, w, c] averaged over whole blocks of pixels until no side is longer than ``largest``."""
    block = -(-max(images.shape[1:3]) // largest)
    if block <= 1:
        return images
    n, height, width, channels = images.shape
    rows, columns = max(height // block, 1), max(width // block, 1)
    down, across = min(block, height), min(block, width)
    cut = images[:, : rows * down, : columns * across].reshape(n, rows, down, columns, across, channels)
    mean = cut.mean((2, 4), dtype=np.float32)
    return np.round(mean).astype(images.dtype) if images.dtype.kind in "iu" else mean


def extra_columns(extras: dict[str, Any]) -> Iterator[tuple[pa.Field, pa.Array]]:
    """Columns of a score file beside the scores; those that are None, or too large to keep, are left out."""
    for name, values in extras.items():
        about: dict[str, Any] = {}
        if values is None or not len(values):
            continue
        if name == "text":
            column = pa.array([text.encode("utf-8", "replace").decode() for text in values])
        elif name == "input":
            images = as_images(values)
            kept = np.ascontiguousarray(values, dtype=np.float32) if images is None else images
            if kept.nbytes > _MOST_BYTES or (images is None and kept[0].size > _MOST_NUMBERS):
                continue
            about = {"shape": kept.shape[1:], "type": str(kept.dtype)}
            column = pa.array([row.tobytes() for row in kept])
        elif np.ndim(values) == 2:
            values = np.asarray(values)
            column = pa.array(list(values), type=pa.list_(pa.from_numpy_dtype(values.dtype)))
            about = {"columns": values.shape[1]}
        else:
            column = pa.array(values)
        yield pa.field(name, column.type, metadata={_KEY: json.dumps(about).encode()}), column


def is_extra(field: pa.Field) -> bool:
    """Whether a column is one of ``extra_columns``."""
    return _KEY in (field.metadata or {})


def read_extras(table: pa.Table) -> dict[str, Any]:
    """Arguments of Scores from the columns that ``extra_columns`` made."""
    found: dict[str, Any] = {}
    neighbours: dict[str, np.ndarray] = {}
    for field in filter(is_extra, table.schema):
        about, column = json.loads(field.metadata[_KEY]), table[field.name]
        if "shape" in about:
            flat = np.frombuffer(bytearray().join(column.to_pylist()), dtype=np.dtype(about["type"]))
            found["inputs"] = flat.reshape(len(column), *about["shape"])
        elif "columns" in about:
            flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
            neighbours[field.name] = flat.reshape(len(column), about["columns"])
        elif pa.types.is_string(field.type):
            found[_FIELDS.get(field.name, field.name)] = column.to_pylist()
        else:
            found[field.name] = column.to_numpy()
    return {**found, "neighbours": neighbours} if neighbours else found
