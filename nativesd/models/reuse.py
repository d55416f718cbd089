"""Features of the UNet's deep levels, kept from one call for the next ones (DeepCache)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Reuse:
    """What comes up into level `level` (0 is the one of the most cells): left by a call that is `fresh`, else taken.

    Source: Ma et al. 2023, arXiv 2312.00858, section 3.3, where a skip's branch is a whole level here.
    """

    level: int = 0
    fresh: bool = True
    features: Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether the levels below need not be computed."""
        return not self.fresh and self.features is not None
