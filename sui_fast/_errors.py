"""Named errors, the one way to phrase them (which argument, what was expected, what came, what to do), and the checks
that most arguments need.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path

import numpy as np
import torch


class SuiError(Exception):
    """Base of every error that sui_fast raises on purpose."""


class ArgumentError(SuiError, ValueError):
    """An argument has a value that cannot give a right number."""


class DataError(ArgumentError):
    """The data (samples, targets, order, finiteness) cannot be scored as given."""


class ModelError(DataError, RuntimeError):
    """The model itself fails on the samples it is given."""


class StabilityError(ArgumentError):
    """Gradient descent with this learning rate diverges."""


class CoverageError(SuiError, RuntimeError):
    """A chosen parameter acts on the outputs in a way that no rule and no fallback accounts for."""


class BackendError(SuiError, RuntimeError):
    """A backend named by the user cannot run this call."""


class StoreError(SuiError):
    """A store on disk is damaged, belongs to another run, or is being written by another process."""


class ProcessError(SuiError, RuntimeError):
    """Another process of the run failed; its own error says why."""


class SpectrumError(SuiError, ArithmeticError):
    """A kernel matrix is too large, not finite, or not positive semi-definite."""


def complaint(argument: str, expected: str, got: object, todo: str) -> str:
    """Four-part message: ``argument: expected ..., got .... What to do.``"""
    return f"{argument}: expected {expected}, got {got}. {todo}"


def number(argument: str, value: object, *, positive: bool = False, infinite: bool = False) -> float:
    """A finite real number >= 0 as a float; positive: > 0, and so is its square; infinite: infinity passes.

    Raises:
        ArgumentError: anything else; a truth value and text are no numbers.
    """
    found = math.nan
    if isinstance(value, Real | np.generic | torch.Tensor) and not isinstance(value, bool) and np.size(value) == 1:
        try:
            found = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            pass
    if positive and not (found > 0 and 0 < found * found < math.inf):
        raise ArgumentError(complaint(argument, "a finite number > 0", repr(value), "Pass a positive number."))
    if not found >= 0 or (found == math.inf and not infinite):
        raise ArgumentError(complaint(argument, "a finite number >= 0", repr(value), "Pass a non-negative number."))
    return found


def whole(argument: str, value: object, least: int = 0) -> int:
    """A whole number >= least as an int.

    Raises:
        ArgumentError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value < 1 << 63:
        raise ArgumentError(complaint(argument, f"a whole number >= {least}", repr(value), "Pass an integer."))
    return int(value)


def flag(argument: str, value: object) -> bool:
    """Raises ArgumentError unless the value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(complaint(argument, "True or False", repr(value), "Pass one of the two."))
    return bool(value)


def one_of(argument: str, value: object, known: Iterable[str]) -> None:
    """Raises ArgumentError unless the value is one of the known names."""
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(complaint(argument, f"one of {', '.join(map(repr, known))}", repr(value), "Choose one."))


def path_of(argument: str, value: object) -> Path:
    """A path; never a file descriptor.

    Raises:
        ArgumentError: neither text nor a path, or empty text.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ArgumentError(complaint(argument, "a path", repr(value), "Pass a file or folder by name."))
    return Path(value)
