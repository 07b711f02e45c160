"""What works on this machine, what does not, and the one line that mends it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from .ops import backends, self_test

_PACKAGES = ("sui-fast", "torch", "numpy", "pyarrow", "safetensors", "triton", "cupy-cuda13x", "pybind11")


def doctor(*, show: bool = True) -> dict[str, Any]:
    """Versions, live backends with the reasons against the others, and a self-test of every kernel.

    Args:
        show: print the findings.
    Returns:
        {"versions": {name: version or None}, "backends": {name: None or the reason}, "self_test": {op: {where: None or
        what failed}}, "healthy": bool}.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    found = {"versions": versions, "backends": backends(), "self_test": self_test()}
    found["healthy"] = all(reason is None for tests in found["self_test"].values() for reason in tests.values())
    if show:
        _print(found)
    return found


def _print(found: dict[str, Any]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"machine   {platform.platform()}, {torch.get_num_threads()} threads, {device}")
    print("versions  " + ", ".join(f"{name} {version or '-'}" for name, version in found["versions"].items()))
    for name, reason in found["backends"].items():
        print(f"backend   {name:10} {'live' if reason is None else 'not here: ' + reason}")
    for op, tests in found["self_test"].items():
        print(
            f"op        {op:18} reference" + "".join(f", {where} {reason or 'ok'}" for where, reason in tests.items())
        )
    print(
        "all well" if found["healthy"] else "a kernel disagrees with its reference: it is put aside, please report it"
    )
