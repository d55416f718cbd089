"""Pictures as prompts in whole pictures, against the diffusers pipelines, and what is said of those that do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import nativesd
from conftest import Run
from nativesd import ImageEmbeddings, ImagePrompt, Region
from nativesd.config import VisionEncoderConfig
from nativesd.errors import NativesdError, NativesdWarning, SourceError, UsageError, WeightsError
from nativesd.weights.maps.published import vision_json
from oracles import adapter_of, drawn_adapter, save_adapter, vision_pair
from pipeline.test_image_modes import compare, theirs
from pipeline.test_pipeline import save_model

ENCODER = VisionEncoderConfig(40, 3, 2, 64, "gelu", projection=40, image=42)
OURS: dict[str, Any] = {"steps": 5, "guidance_scale": 6.0, "seed": 5}
THEIRS: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 6.0, "output_type": "np"}


def photo(seed: int, width: int = 60, height: int = 48) -> Image.Image:
    """Smooth colours, of a size of its own."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def face(seed: int) -> Tensor:
    """What a face recogniser gives, of length 1."""
    drawn = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models, adapters for them with the image encoder beside, as they are published."""
    root = tmp_path_factory.mktemp("image_prompts")
    for form in ("sd15", "sdxl"):
        save_model(form, root / form)
        unet = nativesd.load(root / form, device="cpu").config.unet
        for number, kind in enumerate(("base", "plus", "full", "faceid", "faceid-plus")):
            faces = {"lora": 4, "identity": 64, "mlp": 128} if kind.startswith("faceid") else {}
            _, halves = drawn_adapter(adapter_of(unet, kind, **faces), number)  # type: ignore[arg-type]
            for name, tensor in halves["ip_adapter"].items():
                tensor *= 0.3 if "lora" in name else 1.0
            save_adapter(halves, root / f"{form}-{kind}.safetensors")
    _, reference = vision_pair(ENCODER)
    reference.save_pretrained(root / "image_encoder")
    return {path.stem: path for path in root.iterdir()}


def oracle(files: Mapping[str, Path], form: str, *names: str) -> Any:
    """diffusers' pipeline with adapters."""
    pipe = theirs(diffusers.DiffusionPipeline, files[form])
    encoder = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.CLIPVisionModelWithProjection
    pipe.register_modules(
        image_encoder=encoder.from_pretrained(files["image_encoder"]),
        feature_extractor=CLIPImageProcessorPil(size=ENCODER.image, crop_size=ENCODER.image),
    )
    states = []
    for name in names:
        tensors = load_file(files[f"{form}-{name}"])
        halves: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, tensor in tensors.items():
            half, _, rest = key.partition(".")
            halves[half][rest] = tensor
        states.append(halves)
    pipe.load_ip_adapter(
        states, subfolder=[""] * len(names), weight_name=[""] * len(names), image_encoder_folder=None,
        low_cpu_mem_usage=False,
    )  # fmt: skip
    return pipe


@pytest.mark.parametrize("kind", ["base", "plus", "full"])
@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_pictures(files: dict[str, Path], form: str, kind: str) -> None:
    pipe = oracle(files, form, kind)
    pipe.set_ip_adapter_scale(0.7)
    expected = pipe("a red cat", ip_adapter_image=photo(1), generator=torch.Generator().manual_seed(5), **THEIRS).images
    ours = nativesd.load(files[form], device="cpu")
    result = ours("a red cat", image_prompts=[ImagePrompt(files[f"{form}-{kind}"], photo(1), 0.7)], **OURS)
    compare(ours, result, expected)
    plain = ours("a red cat", **OURS)
    assert (plain.latents - result.latents).abs().max() > 0.02, "the picture has to matter"
    assert result.parameters["image_prompts"] == [f"{form}-{kind}"]
    assert "image_prompts" not in plain.parameters


@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_two_adapters_pictures_and_masks(files: dict[str, Path], form: str) -> None:
    """And two pictures made at once, without guidance too."""
    pipe = oracle(files, form, "plus", "base")
    pipe.set_ip_adapter_scale([0.5, 0.9])
    masks = [Image.new("L", (64, 64)), Image.new("L", (64, 64))]
    masks[0].paste(255, (0, 0, 40, 64))
    masks[1].paste(255, (24, 0, 64, 64))
    processed = diffusers.image_processor.IPAdapterMaskProcessor().preprocess(masks)  # (2, 1, H, W)
    told = {"ip_adapter_masks": [processed.transpose(0, 1), torch.ones(1, 1, 64, 64)]}
    ours = nativesd.load(files[form], device="cpu")
    prompts = [
        ImagePrompt(files[f"{form}-plus"], [photo(1), photo(2)], 0.5, mask=masks),
        ImagePrompt(files[f"{form}-base"], photo(3), 0.9),
    ]
    for guidance in (6.0, 1.0):
        expected = pipe(
            ["a red cat"] * 2, ip_adapter_image=[[photo(1), photo(2)], photo(3)], cross_attention_kwargs=told,
            generator=[torch.Generator().manual_seed(s) for s in (5, 6)], **THEIRS | {"guidance_scale": guidance},
        ).images  # fmt: skip
        options = OURS | {"guidance_scale": guidance}
        compare(ours, ours("a red cat", image_prompts=prompts, num_images=2, **options), expected)


@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_faces(files: dict[str, Path], form: str) -> None:
    """FaceID and its LoRA, and FaceID plus in both versions: diffusers is told of the second by hand."""
    identity = face(3)[None]
    both = torch.stack([identity * 0, identity])
    ours = nativesd.load(files[form], device="cpu")
    before = {name: tensor.clone() for name, tensor in ours.unet.state_dict().items()}
    pipe = oracle(files, form, "faceid")
    expected = pipe(
        "a red cat", ip_adapter_image_embeds=[both], generator=torch.Generator().manual_seed(5), **THEIRS
    ).images
    result = ours("a red cat", image_prompts=[ImagePrompt(files[f"{form}-faceid"], identity=identity[0])], **OURS)
    compare(ours, result, expected)
    assert "loras" not in result.parameters
    without = ImagePrompt(files[f"{form}-faceid"], identity=identity, lora_scale=0)
    plain = ours("a red cat", image_prompts=without, **OURS)
    assert (plain.latents - result.latents).abs().max() > 0.02, "the LoRA has to matter"
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.unet.state_dict().items())
    for second in (False, True) if form == "sdxl" else (True,):
        pipe = oracle(files, form, "faceid-plus")
        projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        pixels = pipe.feature_extractor(photo(1), return_tensors="pt").pixel_values
        states = [
            pipe.image_encoder(each, output_hidden_states=True).hidden_states[-2] for each in (pixels * 0, pixels)
        ]
        projection.clip_embeds, projection.shortcut = torch.stack(states), second
        expected = pipe(
            "a red cat", ip_adapter_image_embeds=[both], generator=torch.Generator().manual_seed(5), **THEIRS
        ).images
        adapter = nativesd.load_image_adapter(files[f"{form}-faceid-plus"], device="cpu", shortcut=second)
        prompt = ImagePrompt(adapter, photo(1), identity=identity)
        compare(ours, ours("a red cat", image_prompts=prompt, **OURS), expected)


def test_beside_regions(files: dict[str, Path]) -> None:
    """Halves of one prompt are that prompt; what a picture adds is added once, whatever the texts' shares are."""
    ours = nativesd.load(files["sd15"], device="cpu")
    mask = Image.new("L", (64, 64), 255)
    mask.paste(0, (0, 0, 24, 64))
    prompts = [ImagePrompt(files["sd15-base"], photo(1), 0.7, mask=mask), ImagePrompt(files["sd15-plus"], photo(2))]
    halves = [Region("a red cat", (0, 0, 0.5, 1)), Region("a red cat", (0.5, 0, 1, 1))]
    for guidance in (1.0, 6.0):
        options = OURS | {"guidance_scale": guidance}
        plain = ours("a red cat", **options).latents
        expected = ours("a red cat", image_prompts=prompts, **options).latents
        found = ours("a red cat", image_prompts=prompts, regions=halves, **options).latents
        assert (found - expected).abs().max() < 1e-4
        assert (found - plain).abs().max() > 0.02


def test_faces_of_one_adapter_share_its_lora(files: dict[str, Path]) -> None:
    """It is merged once, also where its file is named in two ways."""
    ours = nativesd.load(files["sd15"], device="cpu")
    path = files["sd15-faceid"]
    one, two = ImagePrompt(path, identity=face(3)), ImagePrompt(path.parent / "." / path.name, identity=face(4))
    same = nativesd.load_image_adapter(path, device="cpu")
    for prompts in ([one, two], [one, replace(two, adapter=same)], [one, replace(one, scale=0.0)]):
        ours("a red cat", image_prompts=prompts, **OURS | {"steps": 1})
        assert [(use.unet, use.text_encoder) for use in ours.uses()] == [(1.0, 0.0)]
    for scale in (0.5, 0.0):
        with pytest.raises(UsageError, match=f"faceid has one LoRA, .* one lora_scale, not 1.0 and {scale}"):
            ours("a red cat", image_prompts=[one, replace(two, lora_scale=scale)], **OURS)


def test_what_has_to_be_passed_again_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    ours = nativesd.load(files["sd15"], device="cpu")
    told = ours.encode_image(photo(1), files["image_encoder"])
    prompts = [
        ImagePrompt(files["sd15-base"], told, 0.7),
        ImagePrompt(
            nativesd.load_image_adapter(files["sd15-plus"], device="cpu"), told, end=0.5, layers={0: 1.0, 2: 0.5},
            weight_type="ease in", mask=Image.new("L", (64, 64), 255),
        ),
    ]  # fmt: skip
    result = ours("a red cat", image_prompts=prompts, **OURS)
    unit = "Module: ip-adapter-auto, Model: sd15-base, Weight: 0.7, Guidance Start: 0, Guidance End: 1"
    assert f'ControlNet 0: "{unit}", ControlNet 1: ' in result.infotext()
    options, unheeded = nativesd.options_from(result.save(tmp_path / "made.png")[0])
    assert unheeded == [
        "ControlNet 0: pass it again: --image-prompt sd15-base PICTURE --image-prompt-scale 0.7",
        "ControlNet 1: pass it again: --image-prompt sd15-plus PICTURE --image-prompt-end 0.5 --image-prompt-layers "
        '"0=1 2=0.5" --image-prompt-weight-type "ease in" --image-prompt-mask MASK',
    ]
    assert "image_prompts" not in options
    again = replace(prompts[1], layers="0=1 2=0.5")
    found = ours("a red cat", image_prompts=[prompts[0], again], **OURS)
    assert torch.equal(found.latents, result.latents)


def test_the_encoder_visits_the_device(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = nativesd.load(files["sd15"], device="cpu", offload=True)
    visiting, there = ours._visiting, list[Any]()

    @contextmanager
    def watched(*modules: Any) -> Iterator[None]:
        there.extend(modules)
        with visiting(*modules):
            yield
        for module in modules:
            there.remove(module)

    encoder = nativesd.load_image_encoder(files["image_encoder"], device="cpu")
    seen = []
    encoder.module.register_forward_hook(lambda module, given, out: seen.append(module in there))
    monkeypatch.setattr(type(ours), "_visiting", lambda self, *modules: watched(*modules))
    ours("a red cat", image_prompts=ImagePrompt(files["sd15-plus"], photo(1)), image_encoder=encoder, **OURS)
    assert seen
    assert all(seen)


def test_a_part_of_the_steps(files: dict[str, Path]) -> None:
    pipe = oracle(files, "sdxl", "base")

    def off(pipe: Any, step: int, timestep: int, told: dict[str, Any]) -> dict[str, Any]:
        pipe.set_ip_adapter_scale(1.0 if step < 2 else 0.0)
        return told

    expected = pipe(
        "a red cat", ip_adapter_image=photo(1), callback_on_step_end=off, generator=torch.Generator().manual_seed(5),
        **THEIRS,
    ).images  # fmt: skip
    ours = nativesd.load(files["sdxl"], device="cpu")
    prompt = ImagePrompt(files["sdxl-base"], photo(1), end=0.6)
    result = ours("a red cat", image_prompts=prompt, **OURS)
    compare(ours, result, expected)
    plain = ours("a red cat", **OURS)
    never = ours("a red cat", image_prompts=replace(prompt, end=0.0), **OURS)
    assert torch.equal(plain.latents, never.latents)


def test_what_an_encoder_said_is_given_again(files: dict[str, Path], tmp_path: Path) -> None:
    """The encoder may be gone then; what was saved serves adapters of every kind."""
    ours = nativesd.load(files["sd15"], device="cpu")
    told = ours.encode_image([photo(1), photo(2)], files["image_encoder"])
    path = told.save(tmp_path / "told.safetensors")
    for kind in ("base", "plus"):
        prompt = ImagePrompt(files[f"sd15-{kind}"], [photo(1), photo(2)], 0.8)
        expected = ours("a red cat", image_prompts=prompt, **OURS)
        alone = tmp_path / kind / "adapter.safetensors"
        alone.parent.mkdir()
        alone.write_bytes(files[f"sd15-{kind}"].read_bytes())
        with pytest.raises(UsageError, match="adapter needs an image encoder, and none lies beside it"):
            ours("a red cat", image_prompts=replace(prompt, adapter=alone), **OURS)
        for given in (path, told, ImageEmbeddings.load(path)):
            found = ours("a red cat", image_prompts=replace(prompt, adapter=alone, picture=given), **OURS)
            assert torch.equal(found.latents, expected.latents)
        there = ours(
            "a red cat", image_prompts=replace(prompt, adapter=alone), image_encoder=files["image_encoder"], **OURS
        )
        assert torch.equal(there.latents, expected.latents)


def test_layers_act_where_they_say(files: dict[str, Path]) -> None:
    pipe = oracle(files, "sd15", "base")
    places = {"down": {"block_1": [0.0, 1.0]}, "up": {"block_0": [1.0, 0.0, 0.5]}}
    pipe.set_ip_adapter_scale(places)
    expected = pipe("a red cat", ip_adapter_image=photo(1), generator=torch.Generator().manual_seed(5), **THEIRS).images
    ours = nativesd.load(files["sd15"], device="cpu")
    adapter = files["sd15-base"]
    compare(ours, ours("a red cat", image_prompts=ImagePrompt(adapter, photo(1), layers=places), **OURS), expected)
    numbered = ImagePrompt(adapter, photo(1), layers={3: 1.0, 5: 1.0, 7: 0.5})  # 0 to 3 down, 4 the middle, 5 to 10 up
    compare(ours, ours("a red cat", image_prompts=numbered, **OURS), expected)


def test_bfloat16_offload_and_few_rows(files: dict[str, Path]) -> None:
    """What is loaded for one dtype makes tokens in it; one by one is the same as together."""
    prompt = ImagePrompt(files["sd15-plus"], photo(1))
    together = nativesd.load(files["sd15"], device="cpu")
    one_by_one = nativesd.load(files["sd15"], device="cpu", offload=True)
    one_by_one.sequential = True
    found = [pipe("a red cat", image_prompts=prompt, **OURS).latents for pipe in (together, one_by_one)]
    assert (found[0] - found[1]).abs().max() < 1e-4
    half = nativesd.load(files["sd15"], device="cpu", dtype="bfloat16")
    assert half("a red cat", image_prompts=prompt, **OURS).latents.isfinite().all()


def test_prompts_of_different_lengths(files: dict[str, Path]) -> None:
    """A picture's rows go in groups by their texts; each picture is the one that is made alone."""
    ours = nativesd.load(files["sd15"], device="cpu")
    prompt = ImagePrompt(files["sd15-base"], photo(1))
    long = "a red cat, " * 40
    both = ours(["a boat", long], image_prompts=prompt, **OURS | {"seed": [5, 6]})
    for number, text in enumerate(("a boat", long)):
        alone = ours(text, image_prompts=prompt, **OURS | {"seed": 5 + number})
        assert (both.latents[number] - alone.latents[0]).abs().max() < 1e-4


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"adapter": "sdxl-base"}, r"sdxl-base is an IP-Adapter for another model \(context 80\)"),
    ({"picture": None}, "sd15-base is prompted by a picture: pass one"),
    ({"identity": torch.zeros(64)}, "takes no identity: it is no FaceID adapter"),
    ({"adapter": "sd15-faceid", "picture": None}, "picture: pass one, or .*, or to a FaceID adapter identity="),
    ({"adapter": "sd15-faceid"}, "is a FaceID adapter: pass identity=, the 64 numbers"),
    ({"adapter": "sd15-faceid", "identity": torch.zeros(64)}, "sees the identity alone: pass no picture"),
    ({"adapter": "sd15-faceid", "picture": None, "identity": torch.zeros(5)}, r"identity must be \(64,\) or \(N, 64\)"),
    ({"layers": [1, 2]}, r"or factors by layer such as \{0: 1.0\}, not \[1, 2\]"),
    ({"layers": 5}, r"or factors by layer such as \{0: 1.0\}, not 5"),
    ({"layers": {}}, r"or factors by layer such as \{0: 1.0\}, not \{\}: what is not named has a factor of 0"),
    ({"layers": {True: 1.0}}, "layers are named by numbers, or by down, mid and up, not by True"),
    ({"layers": {0: float("nan")}}, "a factor of layers must be a number, not nan"),
    ({"picture": []}, "is prompted by a picture: pass one, or image embeddings, not an empty list"),
    ({"picture": ImageEmbeddings(torch.zeros(40))}, r"embedding of .* must be \(N, P\) of one .*, not \(40,\)"),
    ({"picture": ImageEmbeddings(torch.zeros(1, 1, 40))}, r"embedding of .* must be \(N, P\) .*, not \(1, 1, 40\)"),
    ({"picture": ImageEmbeddings(torch.zeros(0, 40))}, r"must be \(N, P\) of one picture or more, not \(0, 40\)"),
    ({"picture": ImageEmbeddings([1.0])}, r"embedding of image embeddings must be a tensor \(N, P\)"),  # type: ignore[arg-type]
    *(
        ({"adapter": "sd15-plus", "picture": ImageEmbeddings(None, torch.zeros(2, 9, 40), torch.zeros(shape))},
         r"negative_states of image embeddings must be .*" + said)
        for shape, said in (
            ((3, 9, 40), r"\(1, 9, 40\) or \(2, 9, 40\), as the states are, not \(3, 9, 40\)"),
            ((1, 8, 40), r"\(1, 9, 40\) or \(2, 9, 40\), as the states are, not \(1, 8, 40\)"),
            ((9, 40), r"\(1 or N, S, W\) of one picture or more, not \(9, 40\)"),
        )
    ),
    *(
        ({"adapter": "sd15-faceid", "picture": None, "identity": identity}, f"floating-point numbers.* not {said}")
        for identity, said in (
            ("x", "str"), ([None], "list"), ([[0.1], [0.1, 0.2]], "list"), (torch.zeros(0, 64), r"\(0, 64\)"),
            (torch.zeros(64).int(), "int32"), (torch.full((64,), float("nan")), "float32"),
        )
    ),
    ({"adapter": "sd15-faceid", "picture": None, "identity": 21.3 * face(3)}, "normed_embedding.* is 21.3 long"),
    ({"mask": [Image.new("L", (9, 9), 255)] * 3}, "3 masks for 1 pictures: one for all, or one for each"),
    ({"picture": 5}, "a picture of image_prompts must be a picture .* or its file, not 5"),
    ({"mask": [5]}, "a mask of image_prompts must be a picture .* or its file, not 5"),
    ({"start": 0.7, "end": 0.2}, "image_prompts: start and end must be 0 <= start <= end <= 1, not 0.7, 0.2"),
    ({"scale": "much"}, "the scale of image_prompts must be"),
    ({"weight_type": "heavy"}, "the weight_type of image_prompts must be linear or"),
    ({"crop": "face"}, "the crop of image_prompts must be center or"),
    ({"layers": "colour"}, "layers must be style, layout, style and layout, or factors by layer, not 'colour'"),
    ({"layers": {99: 1.0}}, "layers has no number 99 in this UNet: they are 0 to 10"),
    ({"layers": {"block_1": 1.0}}, "layers are named by numbers, or by down, mid and up, not by 'block_1'"),
    ({"layers": {"down": {"block_7": 1.0}}}, "layers has 'block_7' in 'down', and this UNet has block_0, block_1"),
    ({"layers": {"down": [1.0, 1.0, 1.0]}}, "layers has 3 factors for 2 transformers of down, block 0"),
    ({"layers": "0=1 2=0.5 0=2"}, "layers has two factors for number 0: keep one of them"),
    ({"layers": {3: 1.0, "3": 0.5}}, "layers has two factors for number 3: keep one of them"),
    ({"lora_scale": 0.5}, "sd15-base has no LoRA of its own, which lora_scale is for: leave it out"),
    ({"adapter": "sd15-plus", "lora_scale": 0}, "sd15-plus has no LoRA of its own"),
    ({"picture": ImageEmbeddings(torch.zeros(1, 40)), "crop": "top"}, "sd15-base: crop is for pictures, and image"),
    ({"layers": {"mid": True}}, "a factor of layers must be a number, not True"),
    ({"picture": ImageEmbeddings(torch.zeros(1, 9))}, "an embedding 40 wide .* image embeddings have .* 9 wide"),
    ({"picture": ImageEmbeddings(states=torch.zeros(1, 9, 40))}, "takes a picture's embedding, which the image"),
    ({"adapter": "image_encoder"}, "image_encoder is no IP-Adapter: see its audit"),
    ({"adapter": 5}, "the adapter of image_prompts must be loaded, or a file, not 5"),
]  # fmt: skip


def test_what_does_not_fit_is_said(files: dict[str, Path]) -> None:
    ours = nativesd.load(files["sd15"], device="cpu")
    for fields, message in REFUSED:
        named = {"adapter": files.get(str(fields.get("adapter", "sd15-base")), fields.get("adapter"))}
        prompt = ImagePrompt(**{"picture": photo(1), **fields, **named})  # type: ignore[arg-type]
        with pytest.raises((NativesdError, NativesdWarning), match=message):
            ours("a red cat", image_prompts=prompt, **OURS)
    other = nativesd.load(files["sdxl"], device="cpu")
    with pytest.raises(UsageError, match="with 16 or 11 transformers, and this one has 6: give factors by layer"):
        other("a red cat", image_prompts=ImagePrompt(files["sdxl-base"], photo(1), layers="style"), **OURS)
    with pytest.raises(
        UsageError, match=r"image_prompts must be nativesd\.ImagePrompt\(adapter, picture\), or several"
    ):
        ours("a red cat", image_prompts=[photo(1)], **OURS)  # type: ignore[list-item]
    with pytest.raises(UsageError, match="here it is image_prompts, with nativesd"):
        ours("a red cat", ip_adapter_image=photo(1))  # type: ignore[call-arg]


def test_an_encoder_of_another_size_is_refused_with_both_widths(files: dict[str, Path], tmp_path: Path) -> None:
    _, reference = vision_pair(replace(ENCODER, width=52, projection=24))
    reference.save_pretrained(tmp_path / "other")
    ours = nativesd.load(files["sd15"], device="cpu")
    for kind, what in (("base", "an embedding 24 wide"), ("plus", "states 52 wide")):
        with pytest.raises(UsageError, match=f"sd15-{kind} takes .* 40 wide .*the image encoder other gives {what}"):
            ours("x", image_prompts=ImagePrompt(files[f"sd15-{kind}"], photo(1)), image_encoder=tmp_path / "other")
    with pytest.raises(SourceError, match="has no CLIP image encoder: see its audit"):
        nativesd.load_image_encoder(files["sd15-base"], device="cpu")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match="holds no image embeddings"):
        ImageEmbeddings.load(tmp_path / "x.safetensors")
    broken = load_file(files["sd15-base"])
    del broken["ip_adapter.3.to_v_ip.weight"]
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(WeightsError, match=r"missing to_v\.1\.weight: expected as ip_adapter\.3\.to_v_ip\.weight"):
        nativesd.load_image_adapter(tmp_path / "broken.safetensors", device="cpu")


def test_a_pickle_is_an_adapter_too(files: dict[str, Path], tmp_path: Path) -> None:
    halves: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in load_file(files["sd15-plus"]).items():
        half, _, rest = key.partition(".")
        halves[half][rest] = tensor
    torch.save(halves, tmp_path / "adapter.bin")
    found = nativesd.load_image_adapter(tmp_path / "adapter.bin", device="cpu")
    expected = nativesd.load_image_adapter(files["sd15-plus"], device="cpu")
    assert found.module.config == expected.module.config
    for name, tensor in expected.module.state_dict().items():
        assert torch.equal(found.module.state_dict()[name], tensor)


def test_on_the_command_line(files: dict[str, Path], tmp_path: Path, run: Run) -> None:
    photo(1).save(tmp_path / "photo.png")
    ours = nativesd.load(files["sd15"], device="cpu")
    told = ours.encode_image(photo(2), files["image_encoder"]).save(tmp_path / "told.safetensors")
    done = run(
        "generate", "a red cat", "--model", str(files["sd15"]), "--steps", "3", "--seed", "5", "--device", "cpu",
        "--image-prompt", str(files["sd15-base"]), "photo.png", "--image-prompt", str(files["sd15-plus"]), str(told),
        "--image-prompt-scale", "0.5", "--image-prompt-end", "1", "--image-prompt-end", "0.7",
        "--image-encoder", str(files["image_encoder"]), "-o", "made.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    prompts = [
        ImagePrompt(files["sd15-base"], photo(1), 0.5, end=1), ImagePrompt(files["sd15-plus"], told, end=0.7),
    ]  # fmt: skip
    expected = ours("a red cat", steps=3, seed=5, image_prompts=prompts).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "made.png")), np.asarray(expected))
    done = run("generate", "x", "--image-encoder", str(files["image_encoder"]))
    assert "--image-encoder does nothing without --image-prompt" in done.stderr
    done = run("generate", "x", "--image-prompt-scale", "1")
    assert "1 --image-prompt-scale for 0 --image-prompt" in done.stderr


def test_the_encoder_folder_is_what_transformers_writes(files: dict[str, Path]) -> None:
    found = nativesd.load_image_encoder(files["image_encoder"], device="cpu")
    assert found.module.config == ENCODER
    assert vision_json(ENCODER)["projection_dim"] == 40
