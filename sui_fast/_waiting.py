"""A sign of life every second from work that takes longer than two, steps to count or not."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

from tqdm.auto import tqdm


def beat(bar: tqdm) -> Callable[[], None]:
    """Draw the bar again every second, after two: a factorisation of minutes is one step. Returns what closes it."""
    if bar.disable:
        return bar.close
    over = threading.Event()

    def draw() -> None:
        wait = 2.0
        while not over.wait(wait):
            bar.refresh()
            wait = 1.0

    def close() -> None:
        over.set()
        thread.join()
        bar.close()

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    return close


def waited_for(function: Callable) -> Callable:
    """A function with ``progress`` among its keywords, which shows its name and the time it has taken."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        hidden = kwargs.get("progress", True) is not True
        close = beat(tqdm(desc=function.__name__, bar_format="{desc}: {elapsed}", delay=2, leave=False, disable=hidden))
        try:
            return function(*args, **kwargs)
        finally:
            close()

    return call
