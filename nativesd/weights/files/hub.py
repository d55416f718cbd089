"""Models from the Hugging Face hub, through its own client: from the cache where they are complete in it."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote as quote_url

from huggingface_hub import constants, get_session, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from nativesd.errors import NetworkError, SourceError, UsageError, quote
from nativesd.reading import MAX_JSON, is_name, parse_json, read_json
from nativesd.schema import REQUIRED, Field, Kind, many, read_fields
from nativesd.version import __version__
from nativesd.weights.files.asking import MissingError, refusal, within
from nativesd.weights.files.folder import INDEX, PICKLED, weight_file
from nativesd.weights.files.source import open_source
from nativesd.weights.formats.container import SUFFIXES
from nativesd.weights.formats.header import read_index

CONFIGS = (INDEX, "scheduler/*.json", "tokenizer*/*")
HEADERS = (INDEX, "config.json", "*/config.json", "*.safetensors.index*.json", "*.bin.index*.json")
"""What an audit needs beside the headers of the weights."""
MAX_FILES = 100_000
"""Of a repository."""
MAX_CONFIGS = 100
"""Files that are fetched beside the weights; published models have less than 30."""


def fetch(repo_id: str, *, half: bool) -> Path:
    """The local folder of a hub model. Complete in the cache: no request is made. Raises NetworkError, SourceError."""
    # not snapshot_download, which wants every file of the repository in the cache, and else asks for lists of lists
    cached = _cached(repo_id, INDEX)
    if cached is not None and _complete(cached.parent, half=half):
        return cached.parent
    return within(repo_id, lambda: _fetch(repo_id, half=half))


def _fetch(repo_id: str, *, half: bool) -> Path:
    names = list_files(repo_id)
    if INDEX not in names:
        raise SourceError(f"{repo_id} has no model_index.json: it is not a model folder in the published layout")
    path = fetch_file(repo_id, INDEX, limit=MAX_JSON)
    index, commit = read_json(path), path.parent.name
    small, large = _matching(repo_id, names, CONFIGS), list[str]()
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        entry = index.get(component)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        file = weight_file(names, component, half=half)
        if file is None:
            raise SourceError(f"{repo_id} has no weights in {component}/ that can be read")
        small.append(f"{component}/config.json")
        if file.endswith(".json"):
            shards = read_index(fetch_file(repo_id, file, revision=commit, limit=MAX_JSON))
            large += [f"{component}/{shard}" for shard in sorted(set(shards.values()))]
        else:
            large.append(file)
    for name in small:
        if name in names:
            fetch_file(repo_id, name, revision=commit, limit=MAX_JSON)
    for name in large:
        fetch_file(repo_id, name, revision=commit)
    return path.parent


def fetch_file(repo_id: str, name: str, *, revision: str | None = None, limit: int | None = None) -> Path:
    """The local path of one file of a repository, of at most `limit` bytes; in the cache, no request is made.

    Raises NetworkError, SourceError.
    """
    if (cached := _cached(repo_id, name, revision)) is not None:
        return cached
    return within(f"{repo_id}/{name}", lambda: Path(hf_hub_download(repo_id, name, revision=revision)), limit)


def fetch_component(named: str, stem: str = "diffusion_pytorch_model") -> Path:
    """The local folder of a repository, or of a folder in one (org/name/folder), that is one component (a VAE, a
    ControlNet); or a file in one. Raises NetworkError, UsageError.
    """
    repo_id, inside = inside_of(named)
    if inside.endswith(SUFFIXES):
        return fetch_file(repo_id, inside)
    folder = f"{inside}/" if inside else ""
    try:
        fetch_file(repo_id, f"{folder}{stem}.safetensors")
    except MissingError:
        fetch_file(repo_id, f"{folder}{PICKLED.get(stem, stem)}.bin")
    return fetch_file(repo_id, f"{folder}config.json", limit=MAX_JSON).parent


def fetch_weights(named: str) -> tuple[Path, str]:
    """The local path of a file in a repository, org/name/folder/file, and that name; or of the only one with weights.

    Such as there may be in a repository or a folder in one, image encoders aside; a pickle beside safetensors does not
    count. Raises NetworkError, and UsageError where there is another number of them.
    """
    repo_id, inside = inside_of(named)
    if inside.endswith(SUFFIXES):
        return fetch_file(repo_id, inside), named
    folder = f"{inside}/" if inside else ""
    files = [
        name
        for name in list_files(repo_id)
        if name.startswith(folder) and name.endswith(SUFFIXES) and "image_encoder/" not in name
    ]
    chosen = [name for name in files if name.endswith(SUFFIXES[0])] or files
    if len(chosen) == 1:
        return fetch_file(repo_id, chosen[0]), f"{repo_id}/{chosen[0]}"
    if not files:
        raise UsageError(f"{named} has no file of weights on the hub: name the file, as {repo_id}/folder/file")
    raise UsageError(f"{named} has {len(chosen)} files of weights: name one, such as {repo_id}/{chosen[0]}")


def inside_of(named: str) -> tuple[str, str]:
    """The repository of org/name/folder/file, and the path in it. Raises UsageError for a path that none can have."""
    owner, name, *inside = named.split("/")
    if not all(map(is_name, inside)):
        raise UsageError(f"{named!a} names no file of a repository: give its path as the hub lists it")
    return f"{owner}/{name}", "/".join(inside)


def fetch_configs(repo_id: str, names: Iterable[str], *, revision: str | None = None) -> Path | None:
    """The local folder with the configs and shard indexes among a repository's files; None where it has none of them.

    Raises NetworkError, SourceError.
    """
    folder = None
    for name in _matching(repo_id, names, HEADERS):
        commit = revision if folder is None else folder.name
        path = fetch_file(repo_id, name, revision=commit, limit=MAX_JSON)
        folder = path.parents[name.count("/")]
    return folder


def list_files(repo_id: str, *, revision: str | None = None) -> list[str]:
    """The paths of a hub repository's files, sorted. Raises NetworkError and UsageError."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{quote(repo_id)} is no repository on the hub: it has to be owner/name") from error
    if constants.HF_HUB_OFFLINE:
        raise NetworkError(f"{repo_id} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it")
    url = f"{constants.ENDPOINT}/api/models/{repo_id}/revision/{quote_url(revision or 'main', safe='')}"
    raw = within(repo_id, lambda: _read(url, repo_id))
    try:
        listed = read_fields(parse_json(raw, "it"), LISTING, "it")["siblings"]
    except SourceError as error:
        raise NetworkError(
            f"{constants.ENDPOINT} gave no list of {repo_id}'s files ({error}): check HF_ENDPOINT"
        ) from error
    return sorted(name for name in set(listed) if all(map(is_name, name.split("/"))))


def headers_for(*, signed_in: bool) -> dict[str, str]:
    """What goes with a request: who asks, and the token, for the hub alone."""
    headers = {"User-Agent": f"nativesd/{__version__}"}
    if signed_in and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _read(url: str, name: str) -> bytes:
    """An answer of the hub's API; its client would read one of any length."""
    raw = bytearray()
    with get_session().stream("GET", url, headers=headers_for(signed_in=True), follow_redirects=True) as response:
        if response.status_code != 200:
            raise refusal(response.status_code, response.headers, name)
        for chunk in response.iter_raw():
            raw += chunk
            if len(raw) > MAX_JSON:
                raise NetworkError(f"{constants.ENDPOINT} gave no list of {name}'s files, but over {MAX_JSON} bytes")
    return bytes(raw)


def _sibling(value: Any) -> str:
    if not isinstance(value, dict) or not isinstance(name := value.get("rfilename"), str):
        raise ValueError
    return name


LISTING = (Field("siblings", many(Kind("{'rfilename': name}", _sibling), MAX_FILES, 0), REQUIRED),)
"""What is read of the API's answer on a repository."""


def _matching(repo_id: str, names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(found) > MAX_CONFIGS:
        raise SourceError(f"{repo_id} has {len(found)} configs, more than the {MAX_CONFIGS} of any model")
    return found


def _cached(repo_id: str, name: str, revision: str | None = None) -> Path | None:
    """A file in the hub's cache. Raises SourceError, UsageError."""
    try:
        cached = try_to_load_from_cache(repo_id, name, revision=revision)
    except HFValidationError as error:
        raise UsageError(f"{quote(repo_id)} is no repository on the hub: it has to be owner/name") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"the hub's cache cannot be read: {error}; check HF_HOME and the rights to it") from error
    return Path(cached) if isinstance(cached, str) else None


def _complete(path: Path, *, half: bool) -> bool:
    """Whether a cached snapshot has every file that loading needs."""
    try:
        names = {member.name for member in open_source(path, half=half)}
    except SourceError:
        return False
    return {"unet", "vae"} <= names and (path / "scheduler" / "scheduler_config.json").is_file()
