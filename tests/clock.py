"""How long something takes, whatever else the machine does meanwhile."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable


def seconds_of(call: Callable[[], object], enough: float, tries: int = 3) -> float:
    """Seconds of the processor that `call` takes on this thread: the least of up to three tries, fewer where one is
    below `enough`.

    Other programs and threads, and the collection of what earlier tests left behind, can only add to it.
    """
    least = float("inf")
    for _ in range(tries):
        gc.collect()
        gc.disable()
        try:
            started = time.thread_time()
            call()
            least = min(least, time.thread_time() - started)
        finally:
            gc.enable()
        if least < enough:
            break
    return least
