"""Downloads from a hub that lies: no file outside its cache, no traceback, no waiting without end, no token lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from attacks.hub import API, BODIES, HEADERS, MODEL, PLACES, STATUSES, Hub, serve
from nativesd.config import Level, UNetConfig, VisionEncoderConfig
from nativesd.errors import NativesdError, NetworkError, SourceError, UsageError
from nativesd.loading.image_prompts import find_image_encoder, load_image_adapter, load_image_encoder
from nativesd.shipped import LCM_LORA, TINY
from nativesd.weights.files import asking
from nativesd.weights.files.hub import fetch, fetch_component, fetch_file, fetch_weights, list_files
from nativesd.weights.files.remote import open_remote
from nativesd.weights.lora.file import read_lora
from oracles import adapter_of, drawn_adapter, save_adapter, vision_pair

SMALL = UNetConfig((Level(32, (1,), (1, 1), 2), Level(32, (None,), (None, None), 2)), (1,), context=8)
FOLDERS = ("models", "sdxl_models")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with an empty cache and a token."""
    with serve(Hub()) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(asking, "PATIENCE", 10.0)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield served
        close_session()


@pytest.fixture
def impatient(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may keep us waiting for a moment only."""
    monkeypatch.setattr(asking, "PATIENCE", 0.3)


def tiny() -> dict[str, bytes]:
    """The embedded model as a repository."""
    return {str(path.relative_to(TINY)): path.read_bytes() for path in TINY.rglob("*") if path.is_file()}


def told(call: Callable[[], object]) -> str:
    """What a call says where it fails, "" where it does not."""
    message = ""
    try:
        call()
    except NativesdError as error:
        message = str(error)
    assert len(message) < 500, message
    return message


def test_a_model_is_fetched_once(hub: Hub) -> None:
    hub.files = tiny() | {"README.md": b"x", "unet/diffusion_pytorch_model.fp16.safetensors": b"x"}
    folder = fetch("org/name", half=False)
    assert (folder / "unet" / "config.json").read_bytes() == hub.files["unet/config.json"]
    assert not (folder / "README.md").exists()
    asked = len(hub.asked)
    assert all(headers["authorization"] == "Bearer hf_secret" for _, _, headers in hub.asked)
    assert fetch("org/name", half=False) == folder
    assert len(hub.asked) == asked


def test_a_component_that_has_only_a_pickle(hub: Hub) -> None:
    """Where there is no safetensors file; any other failure is told."""
    hub.files = {"diffusion_pytorch_model.bin": b"x", "config.json": b"{}"}
    assert (fetch_component("org/name") / "diffusion_pytorch_model.bin").read_bytes() == b"x"
    hub.place, hub.fault, hub.files = "head", 403, {"diffusion_pytorch_model.safetensors": b"x"}
    with pytest.raises(NetworkError, match=r"org/other/diffusion_pytorch_model.safetensors is refused \(403\)"):
        fetch_component("org/other")


def test_the_part_of_a_model_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(NetworkError, match=r"org/name/x\.json is not on the hub: its repository has no such file"):
        fetch_file("org/name", "x.json")
    hub.files = {"README.md": b""}
    with pytest.raises(SourceError, match=r"org/name has no model_index\.json"):
        fetch("org/name", half=False)


@pytest.mark.parametrize("fault", API)
def test_a_list_that_is_none(hub: Hub, fault: str) -> None:
    hub.place, hub.fault = "api", fault
    with pytest.raises(NativesdError, match="org/name") as refused:
        fetch("org/name", half=False)
    assert len(str(refused.value)) < 500
    if not fault.startswith(("names", "configs")):
        assert "gave no list of org/name's files" in str(refused.value)
        assert isinstance(refused.value, NetworkError)


@pytest.mark.parametrize("fault", HEADERS)
@pytest.mark.parametrize("missing", [False, True])
def test_headers_that_lead_elsewhere(hub: Hub, fault: str, missing: bool, tmp_path: Path) -> None:
    """Nothing is written beside the repository's own folder, of a file that is there and of one that is not."""
    hub.place, hub.fault = "head", fault
    message = told(lambda: fetch_file("org/name", "absent" if missing else "model_index.json"))
    assert "org/name" in message or not missing
    assert message or not any(word in fault for word in ("version", "commit"))
    home = tmp_path / "home" / "hub"
    own = home / "models--org--name"
    assert not [path for path in (tmp_path / "home").rglob("x*") if path.name == "x"]
    if home.exists():
        assert {path.name for path in home.iterdir()} <= {own.name, ".locks", "CACHEDIR.TAG"}
    assert {path.parent.name for path in own.rglob("*") if path.is_file()} <= {"blobs", "refs"} | {
        path.name for path in own.glob("*/*")
    }


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", BODIES)
def test_answers_that_do_not_end(hub: Hub, place: str, fault: str) -> None:
    """Read, or refused in time, whatever is asked for."""
    hub.place, hub.fault = place, fault
    start = time.monotonic()
    messages = [told(lambda: fetch("org/name", half=False)), told(lambda: open_remote("org/name"))]
    assert all(messages) or place == "head" or fault in ("packed", "many headers")
    assert time.monotonic() - start < 8


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("status", STATUSES)
def test_every_status(hub: Hub, place: str, status: int) -> None:
    hub.place, hub.fault = place, status
    assert told(lambda: fetch("org/name", half=False))
    assert len(hub.asked) < 100


@pytest.mark.usefixtures("impatient")
def test_a_slow_server_says_what_it_was_slow_with(hub: Hub) -> None:
    hub.place, hub.fault = "api", "silent"
    with pytest.raises(NetworkError, match=r"took over 0.3 s for the list of files.*HF_HUB_ETAG_TIMEOUT"):
        list_files("org/name")
    hub.place, hub.fault = "get", "slow"
    with pytest.raises(NetworkError, match=r"took over 0.3 s for 'model_index.json'"):
        fetch_file("org/name", "model_index.json")


def test_a_server_in_trouble_is_asked_three_times(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "PATIENCE", 30.0)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.place, hub.fault, hub.elsewhere = "head", 503, ""
    with pytest.raises(NetworkError, match=r"the server is in trouble \(503\)"):
        fetch_file("org/name", "model_index.json")
    assert len(hub.asked) == asking.TRIES


@pytest.mark.parametrize("status", [302, 307])
@pytest.mark.parametrize("place", PLACES)
def test_a_token_stays_with_its_host(hub: Hub, place: str, status: int) -> None:
    with serve(Hub(files=tiny())) as other:
        hub.files, hub.elsewhere = tiny(), other.address
        hub.place, hub.fault = place, status
        assert "hf_secret" not in told(lambda: fetch("org/name", half=False))
        assert not any("authorization" in headers for _, _, headers in other.asked)
        assert other.asked


def test_a_large_config_is_not_downloaded(hub: Hub) -> None:
    hub.files = MODEL | {"model_index.json": b" " * 33_000_000}
    with pytest.raises(NetworkError, match=r"model_index\.json cannot be had: it has 33000000 bytes, more"):
        fetch("org/name", half=False)


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("mine")
    with pytest.raises(SourceError, match=r"the hub's cache cannot be used: .*home.*check HF_HOME"):
        fetch_file("org/name", "model_index.json")
    assert (tmp_path / "home").read_text() == "mine"


def test_an_index_of_shards_is_followed(hub: Hub) -> None:
    index = json.dumps({"weight_map": {"a": "../../x.safetensors"}}).encode()
    hub.files = {
        "model_index.json": MODEL["model_index.json"], "unet/diffusion_pytorch_model.safetensors.index.json": index,
    }  # fmt: skip
    with pytest.raises(SourceError, match="outside its folder"):
        fetch("org/name", half=False)


def test_a_file_in_a_repository_and_the_only_one_of_it(hub: Hub) -> None:
    hub.files = {"a/x.safetensors": b"x", "a/x.bin": b"p", "image_encoder/model.safetensors": b"e"}
    assert fetch_component("org/name/a/x.safetensors").read_bytes() == b"x"
    path, name = fetch_weights("org/name")
    assert (path.read_bytes(), name) == (b"x", "org/name/a/x.safetensors")
    hub.files |= {"b/y.safetensors": b"y"}
    assert fetch_weights("org/name/b")[1] == "org/name/b/y.safetensors"
    with pytest.raises(UsageError, match=r"org/name has 2 files of weights: name one, such as org/name/a/x.safet"):
        fetch_weights("org/name")
    with pytest.raises(UsageError, match=r"org/name/c has no file of weights on the hub"):
        fetch_weights("org/name/c")
    with pytest.raises(NetworkError, match=r"org/name/c/z\.bin is not on the hub: its repository has no such file"):
        fetch_weights("org/name/c/z.bin")
    for named in ("org/name/../x.safetensors", "org/name//x.safetensors"):
        with pytest.raises(UsageError, match="names no file of a repository"):
            fetch_weights(named)


def test_a_lora(hub: Hub) -> None:
    hub.files = {"pytorch_lora_weights.safetensors": LCM_LORA.read_bytes()}
    local = read_lora(LCM_LORA)
    for named in ("org/name", "org/name/pytorch_lora_weights.safetensors"):
        assert read_lora(named).groups == local.groups


def test_an_ip_adapter_brings_the_image_encoder_of_its_repository(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that serves it, of which alone the weights are fetched; then no request is made, and none is needed."""
    save_adapter(drawn_adapter(adapter_of(SMALL, "base"))[1], tmp_path / "base.safetensors")
    hub.files = {f"{folder}/base.safetensors": (tmp_path / "base.safetensors").read_bytes() for folder in FOLDERS}
    for folder, width in zip(FOLDERS, (40, 56), strict=True):
        config = VisionEncoderConfig(64, 2, 1, 128, "gelu", projection=width, image=56)
        vision_pair(config)[1].save_pretrained(tmp_path / folder)
        for file in (tmp_path / folder).iterdir():
            hub.files[f"{folder}/image_encoder/{file.name}"] = file.read_bytes()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for folder in FOLDERS:
            adapter = load_image_adapter(f"org/name/{folder}/base.safetensors", device="cpu")
            found = find_image_encoder(adapter)
            assert found is not None
            assert (found.parent.name, found.name) == ("models", "image_encoder")
            assert load_image_encoder(found, device="cpu").module.config.projection == 40
        asked, hub.asked[:] = list(hub.asked), []
        assert bool(asked) != offline
        assert not [path for _, path, _ in asked if path.endswith("sdxl_models/image_encoder/model.safetensors")]
    assert load_image_encoder("org/name/models/image_encoder", device="cpu").module.config.projection == 40
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        load_image_adapter("org/name/models/other.safetensors", device="cpu")
    monkeypatch.chdir(tmp_path)
    for named in ("here/other.safetensors", "models/below/it/other.safetensors"):  # there is a folder models
        with pytest.raises(SourceError, match=r"does not exist: name a file, a folder, or on the hub org/name or"):
            load_image_adapter(named, device="cpu")


def test_an_ip_adapter_whose_image_encoder_is_elsewhere(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(drawn_adapter(adapter_of(SMALL, "base"))[1], tmp_path / "base.safetensors")
    hub.files = {"base.safetensors": (tmp_path / "base.safetensors").read_bytes()}
    adapter = load_image_adapter("org/name", device="cpu")
    assert find_image_encoder(adapter) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        find_image_encoder(adapter)
