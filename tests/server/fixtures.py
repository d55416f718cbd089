"""A server for the tests of this room, once for all of them: the embedded model, in a thread of this process."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

import nativesd
from nativesd.config import VisionEncoderConfig
from nativesd.server.context import Context
from nativesd.server.serve import bind, make_server
from nativesd.server.settings import Settings
from oracles import adapter_of, drawn_adapter, save_adapter, vision_pair

PROMPT = "a strawberry on a yellow background"


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    context: Context

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=60, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> requests.Response:
        return requests.post(self.url + path, json=json, timeout=60, **options)

    def finished(self, path: str) -> dict[str, Any]:
        """A job's own words when it is over."""
        return until(lambda: found if (found := self.get(path).json())["ended"] else None)


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What a condition gives when it first gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@contextmanager
def serving(**options: Any) -> Iterator[Running]:
    """A server with these settings, on a free port."""
    settings = Settings(port=0, **options)
    bound = bind(settings)
    server = make_server(settings, grace=5)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", server.context)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def lora_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA for the embedded model."""
    folder = tmp_path_factory.mktemp("loras")
    generator = torch.Generator().manual_seed(0)
    key, width = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 144
    save_file(
        {
            f"{key}.lora_down.weight": torch.randn(4, width, generator=generator),
            f"{key}.lora_up.weight": torch.randn(width, 4, generator=generator) / 4,
            f"{key}.alpha": torch.tensor(4.0),
        },
        folder / "style.safetensors",
    )
    return folder


BASE, PLUS = "ip-adapter_sd15", "ip-adapter-plus_sd15"


@dataclass(frozen=True)
class Adapters:
    """A folder of ControlNets, as A1111 has them: IP-Adapters among them; and one of image encoders."""

    models: Path
    encoders: Path

    def adapter(self, name: str) -> Path:
        return self.models / f"{name}.safetensors"

    @property
    def encoder(self) -> Path:
        return self.encoders / "clip"


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, pipe: nativesd.Pipeline) -> Adapters:
    """For the embedded model, with random weights; "other" is an image encoder of another width."""
    out = Adapters(tmp_path_factory.mktemp("adapters"), tmp_path_factory.mktemp("encoders"))
    save_adapter(drawn_adapter(adapter_of(pipe.config.unet, "base"), 0)[1], out.adapter(BASE))
    save_adapter(drawn_adapter(adapter_of(pipe.config.unet, "plus"), 1)[1], out.adapter(PLUS))
    for name, width in (("clip", 40), ("other", 56)):
        config = VisionEncoderConfig(width, 2, 1, 64, "gelu", projection=width, image=42)
        vision_pair(config)[1].save_pretrained(out.encoders / name)
    return out


@pytest.fixture(scope="session")
def server(lora_dir: Path) -> Iterator[Running]:
    with serving(lora_dirs=(lora_dir,), queue=64) as running:
        yield running


@pytest.fixture(scope="session")
def pipe() -> nativesd.Pipeline:
    """The library, to compare with."""
    return nativesd.load()


@pytest.fixture(scope="session")
def picture(pipe: nativesd.Pipeline) -> Image.Image:
    """A picture to begin from."""
    return pipe("a small cactus on a pink background", seed=5, steps=4).images[0]


@pytest.fixture(scope="session")
def mask() -> Image.Image:
    """White in the middle."""
    image = Image.new("L", (64, 64))
    image.paste(255, (20, 24, 44, 48))
    return image


def pixels(image: Image.Image | bytes | str) -> NDArray[np.uint8]:
    """Of a picture, its file, or that in base64."""
    if isinstance(image, str):
        image = base64.b64decode(image)
    if isinstance(image, bytes):
        image = Image.open(BytesIO(image))
    return np.asarray(image.convert("RGB"))


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    """In base64."""
    return base64.b64encode(file_of(image, kind)).decode()


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    data = BytesIO()
    image.save(data, format=kind)
    return data.getvalue()


SLOW: Mapping[str, Any] = {"prompt": PROMPT, "steps": 150, "width": 128, "height": 128, "seed": 1}
"""A job that runs until it is ended: about 10 seconds."""
