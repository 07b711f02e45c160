"""Figures as inline SVG and samples as PNG data URIs: no plotting library, no request to anywhere."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 280, 52, 40, 14


def _logarithm(x: np.ndarray) -> tuple[np.ndarray, float]:
    """log10 of the values, cut off at the smallest positive one and twelve decades below the largest."""
    positive = x[x > 0]
    if not len(positive):
        return np.zeros_like(x), 0.0
    low = max(np.log10(positive.min()), np.log10(positive.max()) - 12)
    return np.where(x > 10**low, np.log10(np.maximum(x, 1e-300)), low), low


def _ticks(low: float, high: float) -> list[int]:
    step = max(1, int(np.ceil((high - low) / 6)))
    return list(range(int(np.ceil(low)), int(np.floor(high)) + 1, step))


def _axis(low: float, high: float, label: str, *, vertical: bool) -> str:
    parts = []
    for tick in _ticks(low, high):
        share = (tick - low) / (high - low)
        if vertical:
            y = HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">1e{tick}</text>')
        else:
            x = LEFT + share * (WIDTH - LEFT - 8)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">1e{tick}</text>')
    middle = (WIDTH + LEFT) / 2
    parts.append(
        f'<text transform="translate(13 {HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(label)}</text>'
        if vertical
        else f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>'
    )
    return "".join(parts)


def _frame(name: str, body: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">{body}</svg>'


def histogram(values: np.ndarray, label: str) -> str:
    """Histogram of non-negative values on a logarithmic axis."""
    logs, _ = _logarithm(values)
    low, high = float(logs.min()), float(logs.max())
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-9 else (low, high)
    counts, edges = np.histogram(logs, bins=40, range=(low, high))
    scale = (HEIGHT - BOTTOM - TOP) / max(counts.max(), 1)
    parts = [_axis(low, high, label, vertical=False)]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        x = LEFT + (left - low) / (high - low) * (WIDTH - LEFT - 8)
        width = (right - left) / (high - low) * (WIDTH - LEFT - 8) - 1
        if count:
            parts.append(
                f'<rect class="bar" x="{x:.1f}" y="{HEIGHT - BOTTOM - count * scale:.1f}" width="{width:.1f}" '
                f'height="{count * scale:.1f}"><title>{count} samples, 1e{left:.1f} to 1e{right:.1f}</title></rect>'
            )
    parts.append(f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{counts.max()}</text>')
    return _frame(f"histogram of {label}", "".join(parts))


def scatter(
    x: np.ndarray, y: np.ndarray, x_label: str, y_label: str, classes: np.ndarray | None, titles: list[str]
) -> str:
    """Points on two logarithmic axes, coloured by class; the title of each shows on hover."""
    (lx, _), (ly, _) = _logarithm(x), _logarithm(y)
    ranges = []
    for logs in (lx, ly):
        low, high = float(logs.min()), float(logs.max())
        pad = max(0.03 * (high - low), 0.05)
        ranges.append((low - pad, high + pad))
    (x0, x1), (y0, y1) = ranges
    parts = [_axis(x0, x1, x_label, vertical=False), _axis(y0, y1, y_label, vertical=True)]
    px = LEFT + (lx - x0) / (x1 - x0) * (WIDTH - LEFT - 8)
    py = HEIGHT - BOTTOM - (ly - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)
    for i, title in enumerate(titles):
        colour = 0 if classes is None else int(classes[i]) % 10
        parts.append(
            f'<circle class="c{colour}" cx="{px[i]:.1f}" cy="{py[i]:.1f}" r="2.6">'
            f"<title>{escape(title)}</title></circle>"
        )
    return _frame(f"{y_label} against {x_label}", "".join(parts))


def thumbnail(sample: np.ndarray, least: int = 48) -> str | None:
    """A sample [h, w] or [c, h, w] (c = 1, 3) as a PNG data URI, enlarged by whole pixels; None for other shapes."""
    image = np.asarray(sample, dtype=np.float64)
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image.transpose(1, 2, 0)
    elif image.ndim == 2:
        image = image[..., None]
    else:
        return None
    if min(image.shape[:2]) < 2 or max(image.shape[:2]) > 256:
        return None
    low, high = image.min(), image.max()
    pixels = np.uint8(255 * (image - low) / (high - low) + 0.5) if high > low else np.zeros(image.shape, np.uint8)
    zoom = max(1, -(-least // max(pixels.shape[:2])))
    pixels = pixels.repeat(zoom, 0).repeat(zoom, 1)
    height, width, channels = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()
