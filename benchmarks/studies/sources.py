"""Two real sources of one task: scanned digits of scikit-learn, and digits rendered from the fonts of matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager, get_data_path
from PIL import Image, ImageDraw, ImageFont

from benchmarks.studies._data import digits, mlp, table
from sui_fast import compare_sources

N, VALIDATION = 150, 100


def rendered(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits of every text font in several sizes, turned and shifted a little, 8 x 8, in [0, 1]."""
    rng, images, labels = np.random.default_rng(seed), [], []
    fonts = []
    for path in sorted((Path(get_data_path()) / "fonts" / "ttf").glob("*.ttf")):
        name = font_manager.get_font(str(path)).family_name
        if not any(part in name for part in ("STIXSize", "STIXNonUni", "cmex", "cmsy", "cmmi", "Display")):
            fonts.append(path)
    for path in fonts:
        for digit in range(10):
            for _ in range(2):
                font = ImageFont.truetype(str(path), int(rng.integers(40, 56)))
                picture = Image.new("L", (64, 64))
                place = tuple((32 + rng.integers(-4, 5, 2)).tolist())
                ImageDraw.Draw(picture).text(place, str(digit), fill=255, font=font, anchor="mm")
                picture = picture.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
                small = picture.resize((8, 8), Image.Resampling.BOX)
                images.append(np.asarray(small, dtype=np.float32).ravel() / 255)
                labels.append(digit)
    order = rng.permutation(len(labels))
    return torch.from_numpy(np.array(images)[order]), torch.from_numpy(np.array(labels)[order])


def main(seed: int = 0) -> None:
    data = {"scanned": digits(seed), "fonts": rendered(seed)}
    sources, val = {}, {}
    for name, (x, y) in data.items():
        y = (y >= 5).long()
        sources[name] = x[:N], y[:N]
        val[name] = x[N : N + VALIDATION], y[N : N + VALIDATION]
    found = compare_sources(mlp(512, 1, seed), sources, val, progress=False)
    rows = []
    for i, name in enumerate(found.names):
        row = [name, int(found.sizes[i]), f"{found.si[i]:.3g}", f"{found.group_si[i]:.3g}"]
        row += [f"{x:.3g}" for j in range(2) for x in (found.fsi[i, j], found.group_fsi[i, j])]
        rows.append([*row, f"{found.overlap_si[i, 1 - i]:.3g}", f"{found.overlap_fsi[i, 1 - i]:.3g}"])
    table(
        "Sources",
        ["source", "samples", "SI of a sample", "SI of the source", "F-SI of a sample for scanned", "of the source",
         "F-SI of a sample for fonts", "of the source", "overlap, SI", "overlap, F-SI"],
        rows,
        f"Nats (sigma = 1); below 5 against the rest, MLP-512, reg=\"auto\". {found.summary()} "
        "`python -m benchmarks.studies.sources`",
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
