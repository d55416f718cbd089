"""Model folders from the Hugging Face hub, through its own client: from the cache where they are complete in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    errors,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from nativesd.errors import NetworkError, SourceError
from nativesd.reading import read_json
from nativesd.weights.files.folder import PICKLED, weight_files
from nativesd.weights.files.header import read_index
from nativesd.weights.files.source import open_source

# the client's transport error, of whichever HTTP library it stands on
TRANSPORT_ERROR: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]

CONFIGS = ["model_index.json", "scheduler/*.json", "tokenizer*/*"]


def fetch(repo_id: str, *, half: bool) -> Path:
    """The local folder of a hub model. Complete in the cache: no request is made. Raises NetworkError."""
    # not snapshot_download(local_files_only=True), which wants every file of the repository
    cached = try_to_load_from_cache(repo_id, "model_index.json")
    if isinstance(cached, str) and _complete(Path(cached).parent, half=half):
        return Path(cached).parent
    if constants.HF_HUB_OFFLINE:
        raise NetworkError(f"{repo_id} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it")
    with hub_errors(repo_id):
        names = HfApi().list_repo_files(repo_id)
        if "model_index.json" not in names:
            raise SourceError(f"{repo_id} has no model_index.json: it is not a model folder in the published layout")
        index = read_json(Path(hf_hub_download(repo_id, "model_index.json")))
        patterns = list(CONFIGS)
        for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
            entry = index.get(component)
            if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
                continue
            files = weight_files(names, component, half=half)
            if files is None:
                raise SourceError(f"{repo_id} has no weights in {component}/ that can be read")
            patterns.append(f"{component}/config.json")
            for file in files:
                patterns.append(file)
                if file.endswith(".json"):
                    shards = set(read_index(Path(hf_hub_download(repo_id, file))).values())
                    patterns += [f"{component}/{shard}" for shard in sorted(shards)]
        return Path(snapshot_download(repo_id, allow_patterns=patterns))


def fetch_file(repo_id: str, name: str) -> Path:
    """The local path of one file of a repository; in the cache, no request is made. Raises NetworkError."""
    cached = try_to_load_from_cache(repo_id, name)
    if isinstance(cached, str):
        return Path(cached)
    with hub_errors(repo_id):
        return Path(hf_hub_download(repo_id, name))


def fetch_component(repo_id: str, stem: str = "diffusion_pytorch_model") -> Path:
    """The local folder of a repository that is one component (a VAE, a ControlNet). Raises NetworkError."""
    try:
        fetch_file(repo_id, f"{stem}.safetensors")
    except NetworkError as error:
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
        fetch_file(repo_id, f"{PICKLED.get(stem, stem)}.bin")
    return fetch_file(repo_id, "config.json").parent


def fetch_configs(repo_id: str, *, revision: str | None = None) -> Path:
    """The local folder with a repository's configs and shard indexes, none of its weights. Raises NetworkError."""
    patterns = ["model_index.json", "config.json", "*/config.json", "*.safetensors.index*.json", "*.bin.index*.json"]
    with hub_errors(repo_id):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Whatever the hub's client raises, as NetworkError with one sentence."""
    try:
        yield
    except GatedRepoError as error:
        raise NetworkError(f"{repo_id} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise NetworkError(f"{repo_id} is not on the hub, or is private: check the name, or set HF_TOKEN") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise NetworkError(f"{repo_id} is not in the local cache and the hub cannot be reached") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise NetworkError(f"the hub answered {status} for {repo_id}: try again later") from error
    except (OSError, TRANSPORT_ERROR) as error:
        raise NetworkError(f"the hub cannot be reached for {repo_id}: {error}") from error


def _complete(path: Path, *, half: bool) -> bool:
    """Whether a cached snapshot has every file that loading needs."""
    try:
        names = {member.name for member in open_source(path, half=half)}
    except SourceError:
        return False
    return {"unet", "vae"} <= names and (path / "scheduler" / "scheduler_config.json").is_file()
