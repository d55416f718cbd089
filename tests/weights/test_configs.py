"""The config.json of components: whatever stands in it, there is a network, or one sentence that names the field."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nativesd.errors import SourceError
from nativesd.models.build import expected
from nativesd.sampling.published import FIELDS, SchedulerConfig
from nativesd.sampling.schedule import trained_sigmas
from nativesd.shipped import TINY
from nativesd.weights.files import configs
from nativesd.weights.files.source import components

VALUES = st.sampled_from([
    0, 1, -1, 2, 7, 32, 10**9, 10**30, 1e308, -0.5, 0.5, True, False, "", "x" * 300, "DownBlock2D", "\ud800", "a\nb",
    [], [[]], [1], [1] * 9, [None], [32, 64], ["x"], {}, {"a": 1}, None,
])  # fmt: skip
FOLDERS = {
    "unet": configs.UNET, "vae": configs.VAE, "text_encoder": configs.TEXT, "controlnet": configs.CONTROLNET,
    "scheduler": FIELDS,
}  # fmt: skip


def read(folder: str, data: dict[str, Any], path: Path) -> None:
    if folder == "scheduler":
        trained_sigmas(SchedulerConfig.from_published(data))
        return
    place = path / folder / "config.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(data))
    config = configs.component_config(place)
    if config is not None:
        expected(config)


@pytest.mark.filterwarnings("ignore:.*not understood")
@pytest.mark.parametrize("folder", FOLDERS)
def test_changed_fields_make_a_network_or_a_sentence(folder: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = "scheduler_config.json" if folder == "scheduler" else "config.json"
    good, path = json.loads((TINY / folder / file).read_text()), tmp_path_factory.mktemp("model")
    names = st.sampled_from([*good, *(field.name for field in FOLDERS[folder])])

    @settings(max_examples=150, deadline=5000)
    @given(st.dictionaries(names, VALUES, min_size=1, max_size=3))
    def check(changes: dict[str, Any]) -> None:
        said = ""
        try:
            read(folder, {**good, **changes}, path)
        except SourceError as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 1000

    read(folder, good, path)
    check()


@pytest.mark.parametrize(
    ("folder", "changes", "words"),
    [
        ("unet", {"layers_per_block": 10**9}, "layers_per_block = 1000000000 must be a whole number from 1 to 16"),
        ("unet", {"down_block_types": ["DownBlock2D"]}, "down_block_types .* has 1 entries for 3"),
        ("unet", {"norm_num_groups": 7}, "level 0 has 64, which 7 groups do not divide"),
        ("text_encoder", {"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000 must be"),
        ("vae", {"down_block_types": ["Other"]}, "down_block_types = .'Other'. must be"),
        ("scheduler", {"_class_name": 0}, "_class_name = 0 must be a text"),
        ("scheduler", {"beta_start": [1]}, r"beta_start = \[1\] must be a number"),
    ],
)  # fmt: skip
def test_the_field_is_named(folder: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = "scheduler_config.json" if folder == "scheduler" else "config.json"
    good = json.loads((TINY / folder / file).read_text())
    with pytest.raises(SourceError, match=words):
        read(folder, {**good, **changes}, tmp_path)


@pytest.mark.parametrize("name", ["../mine/text_encoder", "/tmp", "..", "a\\b", "x" * 5000])
def test_components_outside_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({name: ["transformers", "CLIPTextModel"]}))
    with pytest.raises(SourceError, match=r"model_index\.json lists the component") as refused:
        components(tmp_path)
    assert len(str(refused.value)) < 400


def unlisted(folder: Path) -> None:
    (folder / "config.json").mkdir()


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "config.json")


@pytest.mark.parametrize("make", [unlisted, pipe])
def test_a_config_that_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(SourceError, match="not a JSON file"):
        configs.component_config(tmp_path / "config.json")
