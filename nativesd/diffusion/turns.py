"""Whose turn it is: pipelines that share weights make their pictures one after the other, from whatever thread.

A call merges its LoRAs into the weights and packs, moves or casts them, so two at once would paint with each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock

from nativesd.errors import UsageError


class Turns:
    """The turns on one model's weights, which every pipeline over these has in common.

    A copy that `copy.deepcopy` makes has weights of its own, and so turns of its own.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._calling = False

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Meanwhile no other thread's call runs. Inside a call, its own thread goes on."""
        with self._lock:
            yield

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call's turn. Raises UsageError inside another call of the same thread, whose weights it would change."""
        with self._lock:
            if self._calling:
                raise UsageError("a model cannot be called, or given other LoRAs, while it makes pictures (in on_step)")
            self._calling = True
            try:
                yield
            finally:
                self._calling = False


@contextmanager
def take_turns(models: set[Turns], others: set[Turns]) -> Iterator[None]:
    """A call's turn on models, and meanwhile nobody else's on others that it uses as they are.

    All are waited for in the same order by every call, so that no two wait for each other.
    """
    with ExitStack() as stack:
        for turns in sorted(models | others, key=id):
            stack.enter_context(turns.call() if turns in models else turns.wait())
        yield
