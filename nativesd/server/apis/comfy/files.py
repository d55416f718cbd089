"""Pictures by name, as ComfyUI has them in folders: here in memory, bounded, and no path is opened."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from nativesd.errors import UsageError
from nativesd.server.jobs.job import Made
from nativesd.server.settings import Limits
from nativesd.server.wire.bodies import Intake

MOST_BYTES = 256 << 20
SECONDS = 3600.0
KINDS = ("input", "output", "temp")


class Files:
    """The pictures of all clients, by their kind and name."""

    def __init__(self, limits: Limits, lora_dirs: Sequence[Path]) -> None:
        self.lora_dirs = lora_dirs
        self._limits = limits
        self._kept: OrderedDict[tuple[str, str], tuple[bytes, float]] = OrderedDict()
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()

    def put(self, kind: str, name: str, data: bytes) -> None:
        """Keep a file."""
        with self._lock:
            self._kept.pop((kind, name), None)
            self._kept[kind, name] = (data, time.time())
            held = sum(len(each) for each, _ in self._kept.values())
            while len(self._kept) > 1:
                (first, (oldest, since)) = next(iter(self._kept.items()))
                if held <= MOST_BYTES and since > time.time() - SECONDS:
                    return
                held -= len(oldest)
                del self._kept[first]

    def keep(self, made: Sequence[Made], prefix: str, kind: str) -> list[str]:
        """Keep pictures under numbered names, such as ComfyUI_00001_.png, and return these."""
        bare = re.sub(r"[^\w .-]", "_", prefix)[:100].strip(". ") or "ComfyUI"
        names = []
        for each in made:
            with self._lock:
                number = self._numbers[bare] = self._numbers.get(bare, 0) + 1
            names.append(f"{bare}_{number:05}_.png")
            self.put(kind, names[-1], each.data)
        return names

    def get(self, kind: str, name: str) -> bytes | None:
        """A file; None: there is none."""
        with self._lock:
            found = self._kept.get((kind, name))
        return None if found is None else found[0]

    def names(self, kind: str) -> list[str]:
        """The names of a kind."""
        with self._lock:
            return sorted(name for each, name in self._kept if each == kind)

    def picture(self, name: str) -> Image.Image:
        """An uploaded picture, upright, as it is. Raises UsageError."""
        from nativesd.pictures.images import open_image

        data = self.get("input", name)
        if data is None:
            raise UsageError(f"image: {name[:100]!r} is not here any more: upload it again")
        return open_image(Intake(self._limits).decoded("image", data))
