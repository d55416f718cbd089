"""What every API works with: the settings, what there is by name, and the desk."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection

from nativesd.server.jobs.desk import Desk
from nativesd.server.jobs.order import Order, require_bounded
from nativesd.server.jobs.shelf import Catalogue
from nativesd.server.settings import Settings
from nativesd.server.wire.bodies import Intake


@dataclass(frozen=True)
class Context:
    """A server's parts. `context_of` finds them for a request."""

    settings: Settings
    catalogue: Catalogue
    desk: Desk
    started: float = field(default_factory=time.time)
    options: dict[str, Any] = field(default_factory=dict)
    """Settings that clients of A1111's API changed."""

    def intake(self) -> Intake:
        """What reads the pictures of one request."""
        return Intake(self.settings.limits)

    def require_bounded(self, order: Order, names: dict[str, str] | None = None) -> None:
        """Check an order before it waits. Raises UsageError."""
        name = self.catalogue.model(order.model)
        shelf = next((shelf for shelf in self.desk.shelves if shelf.name == name), None)
        size = None if shelf is None or shelf.loaded is None else shelf.loaded.config.size
        require_bounded(order, self.settings.limits, size, names)


def context_of(request: HTTPConnection) -> Context:
    """The server's parts."""
    context: Context = request.app.state.context
    return context
