"""What a caller names, as local paths: the embedded model, a file, a folder, or a hub id, which is fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nativesd import shipped
from nativesd.errors import SourceError
from nativesd.shipped import TINY
from nativesd.weights.files.folder import folder_of
from nativesd.weights.formats.container import SUFFIXES

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_PATH = re.compile(rf"{HUB_ID.pattern}(/[^/]+)*")
"""A repository, or a folder or file in it."""
TAESD = "taesd"
"""What a caller says for the family's TAESD: which one it is, the family decides."""


@dataclass(frozen=True)
class Located:
    """The local paths of a model and of the components that replace its own; TAESD stays the word that it is."""

    path: Path
    unet: Path | None = None
    vae: Path | str | None = None
    text_encoders: tuple[Path, ...] = ()
    preview: Path | str | None = None

    @property
    def unet_file(self) -> Path | None:
        """The single file that the UNet is in: its name may say what no tensor does."""
        file = self.unet or self.path
        return file if self.unet is not None or file.is_file() else None


def locate(
    source: str | Path,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoders: Sequence[str | Path] = (),
    preview: str | Path | None = None,
    half: bool = False,
) -> Located:
    """Where everything lies, fetched where it is on the hub. Raises SourceError, NetworkError."""

    def autoencoder(named: str | Path | None) -> Path | str | None:
        return named if named is None or named == TAESD else locate_part(named)

    return Located(
        path=locate_model(source, half=half),
        unet=None if unet is None else locate_part(unet),
        vae=autoencoder(vae),
        text_encoders=tuple(locate_part(encoder, stem="model") for encoder in text_encoders),
        preview=autoencoder(preview),
    )


def locate_model(source: str | Path, *, half: bool = False) -> Path:
    """A model's local folder or file; of a hub model the files that loading needs. Raises SourceError, NetworkError."""
    if source == "tiny":
        return TINY
    path = folder_of(Path(source))
    if os.path.exists(path):
        return path
    if not _on_hub(source):
        raise SourceError(f"{source} does not exist; a model is 'tiny', a folder, a file, or a hub id such as org/name")
    from nativesd.weights.files.hub import fetch  # the hub's client is not needed for local files

    return fetch(str(source), half=half)


def locate_part(source: str | Path, *, stem: str = "diffusion_pytorch_model") -> Path:
    """The local folder or file of one component; `stem` is what its file is called in a repository of its own.

    On the hub it is a repository, org/name, or a folder or file in one, org/name/folder/file.safetensors. Raises
    SourceError, NetworkError, UsageError.
    """
    path = Path(source)
    if os.path.exists(path):
        return path
    _require_part(source)
    from nativesd.weights.files.hub import fetch_component

    return fetch_component(str(source), stem)


def locate_weights(source: str | Path) -> tuple[Path, str | None]:
    """The local file or folder of what is one file of weights (an IP-Adapter), and its name on the hub if it is there.

    On the hub it is a file in a repository, or the only one of a repository or of a folder in one. Raises SourceError,
    NetworkError, UsageError.
    """
    path = Path(source)
    if os.path.exists(path):
        return path, None
    _require_part(source)
    from nativesd.weights.files.hub import fetch_weights

    return fetch_weights(str(source))


def _require_part(source: str | Path) -> None:
    """Raises SourceError where what is not here is nothing on the hub either."""
    if not _on_hub(source, HUB_PATH):
        raise SourceError(
            f"{source} does not exist: name a file, a folder, or on the hub org/name or org/name/folder/file"
        )


def locate_taesd(family: str) -> Path:
    """The decoder of a family's TAESD, which travels in the package with the encoder beside it."""
    return shipped.TAESD / f"{'taesdxl' if family in ('sdxl', 'refiner') else 'taesd'}_decoder.safetensors"


def other_half(path: Path) -> Path | None:
    """The file beside an encoder's or a decoder's that has the other word in its name, where there is one."""
    for own, other in (("decoder", "encoder"), ("encoder", "decoder")):
        if own in path.stem:
            beside = path.with_name(path.name.replace(own, other))
            return beside if beside.is_file() else None
    return None


def _on_hub(source: str | Path, form: re.Pattern[str] = HUB_ID) -> bool:
    return isinstance(source, str) and form.fullmatch(source) is not None and not is_missing_file(source)


def is_missing_file(source: str) -> bool:
    """Whether a name that is nothing here means a local file, though it looks like one on the hub: `org/name` with a
    file's suffix is no repository, and what would lie in a folder that is here is no file of one."""
    return source.endswith((*SUFFIXES, ".json")) and (source.count("/") == 1 or os.path.isdir(source.partition("/")[0]))
