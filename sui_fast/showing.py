"""What a report shows of the samples themselves: their inputs, where these are one array, and their texts."""

from __future__ import annotations

import numpy as np
import torch

from .jacobians import Read, Samples
from .jacobians.loaders import in_order
from .previews import LARGEST, channels_first, image_shape, shrink

MOST_INPUTS = 1 << 28  # bytes of inputs that scores keep
MOST_READ = 10_000  # samples of a data set read on demand whose inputs scores keep
TEXT_COLUMNS = ("text", "sentence", "content", "document", "question", "prompt")  # what a report shows of a sample


def shown(samples: Samples) -> bool:
    """Whether inputs are kept for the report: not where that takes another pass over many samples on a disk."""
    return not isinstance(samples, Read) or samples.n <= MOST_READ


def small_inputs(samples: Samples, most: int = 16_384) -> np.ndarray | None:
    """The inputs for the report, where they are one array: pictures made small, others of at most ``most`` numbers."""
    if not shown(samples):
        return None
    found, begin = None, 0
    for batch in samples.batches(256):
        if not isinstance(batch, torch.Tensor):  # several inputs: side by side where all are real numbers
            several = list(batch.values()) if isinstance(batch, dict) else list(batch)
            if not all(isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim <= 2 for x in several):
                return None
            batch = torch.cat([x.reshape(len(x), -1).cpu().to(torch.float32) for x in several], 1)
        if batch[0].numel() > most:
            if image_shape(tuple(batch.shape[1:])) is None:
                return None
            pixels = batch.detach().cpu().to(torch.float32)
            first = channels_first(tuple(batch.shape[1:]))
            pixels = pixels.movedim(1, -1) if first else pixels.reshape(*batch.shape[:3], -1)
            part = shrink(pixels.numpy(), LARGEST)
        else:
            part = batch.detach().cpu().to(torch.float32).numpy()
        if found is None:
            if samples.n * part[0].nbytes >= MOST_INPUTS:
                return None
            found = np.empty((samples.n, *part.shape[1:]), part.dtype)
        if part.shape[1:] != found.shape[1:]:
            return None
        found[begin : begin + len(part)] = part
        begin += len(part)
    return found


def texts_of(train, samples: Samples) -> list[str] | None:
    """The texts of a Hugging Face Dataset, alone or in a DataLoader, for the report."""
    if not shown(samples):
        return None
    if isinstance(train, torch.utils.data.DataLoader):
        if not in_order(train):
            return None
        train = train.dataset
    names = getattr(train, "column_names", None)
    if not isinstance(names, list) or not hasattr(train, "with_format") or not hasattr(train, "__len__"):
        return None
    for name in TEXT_COLUMNS:
        if name in names:
            found = train.with_format(None)[name][:]
            if len(found) == samples.n and all(isinstance(text, str) for text in found):
                return list(found)
    return None
