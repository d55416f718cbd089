"""Which step of a pass a call of the denoiser belongs to."""

from __future__ import annotations

from collections.abc import Sequence

CLOSE = 1e-9  # of itself, which a sigma may be off by that went through a logarithm


class Steps:
    """The steps of a pass that begin at `sigmas` (the last one, where it ends, left out).

    starts  the sigmas that samplers ask at when they begin them, which churn raises. Default: `sigmas`
    """

    def __init__(self, sigmas: Sequence[float], starts: Sequence[float] | None = None) -> None:
        self._sigmas, self._starts = sigmas, sigmas if starts is None else starts
        self._begun: int | None = None

    def __len__(self) -> int:
        return len(self._sigmas)

    def at(self, sigma: float) -> int:
        """The step that a sigma belongs to: between the beginnings of two of them, the earlier.

        Churn may raise a step's beginning over those of steps before it: what is asked in between, on the way from a
        raised beginning, belongs to the step begun last.
        """
        exact = [i for i, each in enumerate(self._starts) if abs(each - sigma) <= CLOSE * sigma]
        if exact:
            self._begun = exact[-1]
            return exact[-1]
        begun = self._begun
        if begun is not None and self._sigmas[begun] < sigma <= self._starts[begun]:
            return begun
        return max((i for i, each in enumerate(self._sigmas) if each >= sigma * (1 - CLOSE)), default=0)
