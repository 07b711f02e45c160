"""One thread, no deadlines, and the golden values."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("sui_fast", deadline=None, print_blob=True)
settings.load_profile("sui_fast")


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Arrays of digits_4v9_mlp.npz from SUI_FAST_GOLDEN (file or folder), else from ../shared/golden."""
    name = "digits_4v9_mlp.npz"
    path = Path(os.environ.get("SUI_FAST_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden")
    path = path / name if path.is_dir() else path
    if not path.is_file():
        pytest.skip(f"{name} is not here; point SUI_FAST_GOLDEN to it")
    with np.load(path) as arrays:
        return dict(arrays)
