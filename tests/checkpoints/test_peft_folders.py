"""Folders of peft's adapters: read as LoRAs, written as peft reads them, with the same merge; and DoRA in all names."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_loras import equal, every_kind, with_loras

import nativesd
from conftest import Run
from nativesd.checkpoints.loras.change import convert_lora, join_loras, resize_lora
from nativesd.checkpoints.loras.extract import extract_lora
from nativesd.checkpoints.loras.merge import merge_checkpoint
from nativesd.errors import SourceError, UsageError, WeightsError
from nativesd.weights.lora.file import read_lora
from nativesd.weights.lora.resolve import Use
from pipeline.test_pipeline import save_model
from weights import test_lora as loras

pytestmark = pytest.mark.filterwarnings("ignore:.* of no published form", "ignore:.* will not say ")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {form: tmp_path_factory.mktemp("models") / form for form in ("sd15", "sdxl")}
    for form, folder in out.items():
        save_model(form, folder)
    return out


def merged_by_peft(model: loras.Model, adapters: dict[str, Path]) -> loras.Tensors:
    """diffusers' and transformers' own modules with peft's adapters of the components."""
    states = {name: getattr(model.theirs, name).state_dict() for name in model.ours.hosts}
    for name, folder in adapters.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # it only warns of keys that are missing
            wrapped = peft.PeftModel.from_pretrained(getattr(model.theirs, name), folder)
        states[name] = wrapped.merge_and_unload().state_dict()
    return loras.published(states)


def dora(model: loras.Model, lora: loras.Tensors, *, into: bool = False) -> loras.Tensors:
    """A LoRA in kohya's names with LyCORIS's magnitudes, along the outputs or the inputs."""
    out = dict(lora)
    generator = torch.Generator().manual_seed(5)
    for key, up in lora.items():
        if key.endswith(".lora_up.weight"):
            down = lora[key.replace("lora_up", "lora_down")]
            count, ones = (down.shape[1], up.ndim - 2) if into else (len(up), up.ndim - 1)
            shape = [1, count, *[1] * ones] if into else [count, *[1] * ones]
            scale = torch.rand(count, generator=generator) + 0.5
            out[key.replace("lora_up.weight", "dora_scale")] = scale.reshape(shape)
    return out


@pytest.mark.parametrize("form", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_folder_is_what_peft_reads_and_comes_back(
    form: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Ranks and alphas of several sizes, in all components, of linear layers and convolutions."""
    model = loras.load_model(form, folders)
    names = every_kind(model)
    tensors = loras.in_kohya(model, loras.factors(model, names), ldm=form == "sdxl")
    if kind == "DoRA":
        tensors = dora(model, tensors)
    path = loras.write(tensors, tmp_path / "kohya.safetensors", {"ss_output_name": "kept"})
    folder, file, back = tmp_path / "adapters", tmp_path / "file.safetensors", tmp_path / "back.safetensors"
    done = nativesd.convert(path, folder, layout="peft", base=model.folder)
    components = [name for name in ("unet", "text_encoder", "text_encoder_2") if name in model.ours.hosts]
    assert sorted(each.name for each in folder.iterdir()) == sorted(components)
    assert done.tensors == (3 if kind == "DoRA" else 2) * len(names)
    wanted = with_loras(model, (path, 1.0))
    loras.same(with_loras(model, (folder, 1.0)), wanted)
    for source in (folder, convert_lora(path, file, layout="peft", base=model.folder).path):
        nativesd.convert(source, back, layout="kohya", base=model.folder)
        assert equal(load_file(back), load_file(path))
        back.unlink()
    loras.same(merged_by_peft(model, {name: folder / name for name in components}), wanted)
    theirs = loras.load_model(form, folders)
    theirs.theirs.load_lora_weights(file)
    theirs.theirs.fuse_lora()
    theirs.theirs.unload_lora_weights()
    found = theirs.reference()
    if kind == "DoRA":  # transformers 5 does not find the magnitudes of text encoders that diffusers gives it
        found |= {key: tensor for key, tensor in wanted.items() if not key.startswith("unet.")}
    loras.same(found, wanted)


@pytest.mark.parametrize("said", [True, False])
def test_a_lora_of_one_component_is_one_adapter(said: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    """Also where nothing says an alpha, so that the scale is 1."""
    model = loras.load_model("sd15", folders)
    lora = loras.factors(model, [name for name in loras.attention(model) if name.startswith("unet.")])
    tensors = loras.in_kohya(model, lora) if said else loras.in_peft(lora)
    path = loras.write(tensors, tmp_path / "lora.safetensors")
    convert_lora(path, tmp_path / "adapter", layout="peft", base=model.folder)
    assert sorted(each.name for each in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    wanted = with_loras(model, (path, 1.0))
    loras.same(with_loras(model, (tmp_path / "adapter", 1.0)), wanted)
    loras.same(merged_by_peft(model, {"unet": tmp_path / "adapter"}), wanted)


MID = "mid_block.attentions.0.transformer_blocks.0"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 5, f"{MID}.attn2.to_k": 7}},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "for a Conv1D, which no layer here is": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_pefts_own_folders_are_loras(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """As it saves them, of the UNet and of the text encoder, each in a folder or alone."""
    model = loras.load_model("sd15", folders)
    before = model.reference()
    torch.manual_seed(0)
    targets = {"unet": [f"{MID}.attn1.to_q", f"{MID}.attn2.to_k", "conv1"], "text_encoder": ["q_proj", "fc1"]}
    for component, modules in targets.items():
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, init_lora_weights=False, **SETTINGS[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that fan_in_fan_out is of no use
            wrapped = peft.get_peft_model(getattr(model.theirs, component), config)
        wrapped.save_pretrained(tmp_path / "both" / component)
        wrapped.merge_and_unload()
    wanted = model.reference()
    assert any(not torch.equal(before[key], wanted[key]) for key in wanted if key.startswith("text_encoder."))
    loras.same(with_loras(model, (tmp_path / "both", 1.0)), wanted)
    for component in targets:
        found = with_loras(model, (tmp_path / "both" / component, 1.0))
        own = {key: tensor if key.startswith(f"{component}.") else before[key] for key, tensor in wanted.items()}
        loras.same(found, own)
    for layout in ("kohya", "diffusers"):
        out = tmp_path / f"{layout}.safetensors"
        nativesd.convert(tmp_path / "both", out, layout=layout, base=model.folder)
        loras.same(with_loras(model, (out, 1.0)), wanted)


def test_a_folder_is_taken_wherever_a_lora_is(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    model = loras.load_model("sd15", folders)
    lora = loras.factors(model, loras.attention(model), ranks=(4,))
    path = loras.write(loras.in_kohya(model, lora), tmp_path / "kohya.safetensors")
    folder, base = convert_lora(path, tmp_path / "adapters", layout="peft", base=model.folder).path, str(model.folder)
    assert resize_lora(folder, tmp_path / "small", rank=2, layout="peft", base=model.folder).ranks == (2, 2)
    done = join_loras([(folder, 0.5), (tmp_path / "small", 0.5)], tmp_path / "j", layout="peft", base=model.folder)
    assert done.ranks == (6, 6)
    said = run("lora", "merge", base, "adapters:0.5", "tuned")
    assert (said.returncode, said.stdout) == (0, "tuned\n"), said.stderr
    assert run("lora", "merge", base, "kohya.safetensors:0.5", "other").returncode == 0
    one, other = (
        load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("tuned", "other")
    )
    assert equal(one, other)
    pipe, options = nativesd.load(model.folder), {"steps": 1, "width": 64, "height": 64, "seed": 1}
    pictures = [pipe("a cat", loras=[(each, 0.5)], **options).images[0] for each in (folder, path)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert "2 files" in run("audit", "adapters").stdout


def test_adapters_that_cannot_be_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """One sentence each, and nothing written."""
    model = loras.load_model("sd15", folders)
    path = loras.write(loras.in_kohya(model, loras.factors(model, every_kind(model))), tmp_path / "kohya.safetensors")
    folder = convert_lora(path, tmp_path / "adapters", layout="peft", base=model.folder).path
    config, out = folder / "unet" / "adapter_config.json", tmp_path / "out.safetensors"
    data = json.loads(config.read_text())
    broken: list[tuple[str, type[Exception], str]] = [
        ("{", SourceError, "unet/adapter_config.json"),
        (json.dumps({"r": "many"}), WeightsError, "has no lora_alpha, r and alpha_pattern that are numbers"),
        (
            json.dumps(data | {"init_lora_weights": "pissa_niter_4"}),
            WeightsError,
            r"adapter_config.json: init_lora_weights is 'pissa_niter_4', which changes the base too",
        ),
    ]
    for text, kind, message in broken:
        config.write_text(text)
        with pytest.raises(kind, match=message):
            convert_lora(folder, out, layout="kohya", base=model.folder)
    config.write_text(json.dumps(data))
    (folder / "unet" / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"unet has neither model_index.json nor weights"):
        convert_lora(folder, out, layout="kohya", base=model.folder)
    with pytest.raises(UsageError, match="exists: remove it, or name another"):
        convert_lora(path, folder, layout="peft", base=model.folder)
    assert not out.exists()


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_magnitudes_along_the_inputs_are_kohyas_alone(layout: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = loras.load_model("sd15", folders)
    lora = dora(model, loras.in_kohya(model, loras.factors(model, loras.attention(model)[:2])), into=True)
    path = loras.write(lora, tmp_path / "kohya.safetensors")
    with pytest.raises(UsageError, match=f"the layout {layout} has no DoRA magnitude along the inputs, as .*: kohya's"):
        convert_lora(path, tmp_path / "out.safetensors", layout=layout, base=model.folder)
    assert equal(
        load_file(convert_lora(path, tmp_path / "k.safetensors", layout="kohya", base=model.folder).path), lora
    )


@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_diffusers_and_peft_read_what_is_made(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Extracted, resized and joined, under the names of every layout, with the merge that is ours."""
    model = loras.load_model(form, folders)
    lora = [loras.factors(model, every_kind(model), seed, ranks=(4,)) for seed in (1, 2)]
    files = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for file, factors in zip(files, lora, strict=True):
        loras.write(loras.in_kohya(model, factors, ldm=form == "sdxl"), file)
    merge_checkpoint(model.folder, [Use(read_lora(files[0]))], tmp_path / "tuned")
    base = {"base": model.folder}
    makers: dict[str, Callable[..., Any]] = {
        "extracted": lambda out, **how: extract_lora(tmp_path / "tuned", model.folder, out, rank=3, dtype="f32", **how),
        "resized": lambda out, **how: resize_lora(files[0], out, rank=2, **base, **how),
        "of several ranks": lambda out, **how: resize_lora(files[0], out, ratio=1.5, **base, **how),
        "joined": lambda out, **how: join_loras([(files[0], 0.5), (files[1], -1)], out, **base, **how),
    }
    parts = {name: getattr(model.theirs, name) for name in model.ours.hosts}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    for made, maker in makers.items():
        for layout in ("kohya", "diffusers", "peft"):
            if layout == "kohya" and made == "of several ranks":
                continue  # diffusers 0.42 loses alphas that differ from layer to layer, with peft 0.21
            out = tmp_path / f"{made}-{layout}.safetensors"
            maker(out, layout=layout)
            wanted = with_loras(model, (out, 0.5))
            model.theirs.load_lora_weights(out)
            model.theirs.fuse_lora(lora_scale=0.5)
            model.theirs.unload_lora_weights()
            loras.same(model.reference(), wanted)
            for name, part in parts.items():
                part.load_state_dict(before[name])
        maker(tmp_path / made, layout="peft")
        wanted = with_loras(model, (tmp_path / made, 1.0))
        loras.same(merged_by_peft(model, {name: tmp_path / made / name for name in parts}), wanted)
        for name, part in parts.items():
            part.load_state_dict(before[name])
