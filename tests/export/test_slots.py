"""The slot schema: against the configurations' own shapes for every family and size, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nativesd.config import CONTROLNETS, SDXL_UNION, TEXT_ENCODERS, UNETS, VAES
from nativesd.errors import UsageError
from nativesd.export.slots import (
    CHUNK,
    MIDDLE,
    OUTPUT,
    Request,
    Schema,
    Side,
    Slot,
    controlnet_schema,
    text_encoder_schema,
    unet_schema,
    vae_schema,
)

SD15, SDXL = (unet_schema(UNETS[family], images=False) for family in ("sd15", "sdxl"))
LCM = unet_schema(replace(UNETS["sd15"], guidance=256), images=False)

requests = st.builds(
    Request,
    batch=st.integers(1, 8),
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    tokens=st.integers(1, 5).map(lambda chunks: chunks * CHUNK),
)


def shapes(schema: Schema, request: Request) -> dict[str, tuple[int, ...]]:
    return {slot.name: slot.shape(request) for slot in schema.inputs}


@pytest.mark.parametrize("family", UNETS)
@given(request=requests)
@example(request=Request(1, 125, 127))  # 1000x1016 pixels
@example(request=Request(2, 68, 68))  # 544: half of it is odd
@example(request=Request(4, 1, 3))
def test_control_slots_have_the_residuals_shapes(family: str, request: Request) -> None:
    config = UNETS[family]
    schema = unet_schema(config)
    found = [slot.shape(request) for slot in schema.control]
    assert found == config.residual_shapes(request.batch, request.height, request.width)


@pytest.mark.parametrize("family", UNETS)
def test_control_slots_are_numbered_and_last(family: str) -> None:
    schema = unet_schema(UNETS[family], images=False)
    names = [slot.name for slot in schema.inputs]
    numbered = [f"input_control_{i:02d}" for i in range(len(schema.control) - 1)]
    assert names == [*names[: -len(schema.control)], *numbered, MIDDLE]
    assert unet_schema(UNETS[family], control=False, images=False).inputs == schema.inputs[: -len(schema.control)]
    assert {slot.kind for slot in schema.control} == {"weights"}


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
@given(request=requests)
def test_controlnets_give_what_the_slots_take(family: str, request: Request) -> None:
    unet, control = unet_schema(UNETS[family]), controlnet_schema(CONTROLNETS[family])
    assert [slot.shape(request) for slot in control.outputs] == [slot.shape(request) for slot in unet.control]
    assert [slot.name.removeprefix("control_") for slot in control.outputs] == [
        slot.name.removeprefix("input_control_") for slot in unet.control
    ]
    *shared, hint = control.inputs
    assert tuple(shared) == unet_schema(UNETS[family], control=False, images=False).inputs
    assert hint.shape(request) == (request.batch, 3, 8 * request.height, 8 * request.width)
    assert not control.control


def test_the_names_of_the_inputs() -> None:
    plain = ["sample", "timestep", "encoder_hidden_states"]
    assert [slot.name for slot in SD15.inputs if not slot.is_control] == plain
    assert [slot.name for slot in SDXL.inputs if not slot.is_control] == [*plain, "text_embeds", "time_ids"]
    assert [slot.name for slot in LCM.inputs if not slot.is_control] == [*plain, "timestep_cond"]
    assert [slot.name for slot in SDXL.outputs] == [OUTPUT]
    assert {slot.name: slot.kind for slot in SDXL.inputs if slot.kind != "weights"} == {
        "timestep": "float32", "time_ids": "float32",
    }  # fmt: skip


def test_vae_and_text_encoders() -> None:
    decoder, encoder = vae_schema(VAES["sd"], "vae_decoder"), vae_schema(VAES["sd"], "vae_encoder")
    request = Request(2, 17, 9)
    assert shapes(decoder, request) == {"latent_sample": (2, 4, 17, 9)}
    assert [slot.shape(request) for slot in decoder.outputs] == [(2, 3, 136, 72)]
    assert shapes(encoder, request) == {"sample": (2, 3, 136, 72)}
    assert [slot.shape(request) for slot in encoder.outputs] == [(2, 8, 17, 9)]
    text = text_encoder_schema(TEXT_ENCODERS["bigg"])
    assert shapes(text, request) == {"input_ids": (2, 77)}
    assert [slot.shape(request) for slot in text.outputs] == [(32, 2, 77, 1280), (2, 1280)]


SCHEMAS = {
    **{name: unet_schema(config, images=False) for name, config in UNETS.items()},
    "lcm": LCM,
    "controlnet": controlnet_schema(CONTROLNETS["sdxl"]),
    "vae_decoder": vae_schema(VAES["sd"], "vae_decoder"),
    "vae_encoder": vae_schema(VAES["sd"], "vae_encoder"),
}


@pytest.mark.parametrize("name", SCHEMAS)
@given(request=requests)
def test_shapes_tell_the_request(name: str, request: Request) -> None:
    schema = SCHEMAS[name]
    has_tokens = any("tokens" in slot.axes for slot in schema.inputs)
    assert schema.request(shapes(schema, request)) == (request if has_tokens else replace(request, tokens=CHUNK))


@given(data=st.data(), request=requests)
def test_one_wrong_side_is_refused_by_name(data: st.DataObject, request: Request) -> None:
    given = shapes(SDXL, request)
    # the first slots say what the request is, so that a wrong side of theirs is blamed on another
    slot = data.draw(st.sampled_from([slot for slot in SDXL.inputs if slot.is_control or slot.name == "text_embeds"]))
    axis = data.draw(st.integers(0, len(given[slot.name]) - 1))
    right = given[slot.name]
    wrong = tuple(size + (i == axis) for i, size in enumerate(right))
    with pytest.raises(UsageError) as refusal:
        SDXL.request({**given, slot.name: wrong})
    assert str(refusal.value) == f"unet: {slot.name} was given shape {wrong}, and {request} needs {right}"


def test_halves_rounded_down_are_refused() -> None:
    """The known mistake: 68 cells are halved to 34, 17, and then to 9, not to 8."""
    given = shapes(SD15, Request(2, 68, 68))
    assert given[MIDDLE] == (2, 1280, 9, 9)
    with pytest.raises(UsageError, match=r"middle was given shape \(2, 1280, 8, 8\), .*\(2, 1280, 9, 9\)"):
        SD15.request({**given, MIDDLE: (2, 1280, 8, 8)})


def test_missing_inputs_and_other_dimensions_are_refused() -> None:
    given = shapes(SD15, Request(2, 64, 64))
    missing = {name: shape for name, shape in given.items() if name != "encoder_hidden_states"}
    with pytest.raises(UsageError, match=r"encoder_hidden_states was given nothing, .* needs \(2, 77, 768\)"):
        SD15.request(missing)
    with pytest.raises(UsageError, match=r"sample was given shape \(2, 4, 64\), and"):
        SD15.request({**given, "sample": (2, 4, 64)})
    with pytest.raises(UsageError, match="sample was given nothing"):
        SD15.request({})
    pixels = vae_schema(VAES["sd"], "vae_encoder")
    with pytest.raises(UsageError, match=r"sample was given shape \(1, 3, 100, 64\), .* needs \(1, 3, 96, 64\)"):
        pixels.request({"sample": (1, 3, 100, 64)})


def test_slots_that_are_not_given_are_left_out() -> None:
    given = {slot.name for slot in SD15.inputs} - {MIDDLE, "input_control_03"}
    left = SD15.given(given)
    assert {slot.name for slot in left.inputs} == given
    assert SD15.given(set()).inputs == unet_schema(UNETS["sd15"], control=False, images=False).inputs


def test_a_union_has_no_graph() -> None:
    with pytest.raises(UsageError, match="union chooses among its kinds of hints in Python"):
        controlnet_schema(SDXL_UNION)


def test_comfyui_names() -> None:
    """Those of ComfyUI_TensorRT's exporter, and of its pull request for control: 12 outputs and the middle."""
    renamed = SD15.renamed("comfyui")
    outputs = [f"output_control_{i}" for i in range(12)]
    assert [slot.name for slot in renamed.inputs] == ["x", "timesteps", "context", *outputs, "middle_control_0"]
    assert [slot.name for slot in renamed.outputs] == ["h"]
    request = Request(2, 33, 50)
    assert [slot.shape(request) for slot in renamed.inputs] == [slot.shape(request) for slot in SD15.inputs]
    with pytest.raises(UsageError, match="one vector y in place of text_embeds and time_ids"):
        SDXL.renamed("comfyui")


def test_streamdiffusion_names() -> None:
    renamed = SDXL.renamed("streamdiffusion")
    assert renamed.inputs == SDXL.inputs
    assert [slot.name for slot in renamed.outputs] == ["latent"]


def test_names_are_of_unets() -> None:
    decoder = vae_schema(VAES["sd"], "vae_decoder")
    assert decoder.renamed("nativesd") is decoder
    with pytest.raises(UsageError, match="names of comfyui are those of a UNet, not of a vae_decoder"):
        decoder.renamed("comfyui")


def test_the_digest_changes_with_everything() -> None:
    slot = SD15.inputs[0]
    changed = [
        replace(slot, name="samples"),
        replace(slot, axes=("batch", 9, Side("h"), Side("w"))),
        replace(slot, axes=("batch", 4, Side("h"), Side("w", parts=2))),
        replace(slot, axes=("batch", 4, Side("w"), Side("h"))),
        replace(slot, kind="float32"),
    ]
    variants = [
        SD15,
        SD15.renamed("comfyui"),
        SD15.renamed("streamdiffusion"),
        unet_schema(UNETS["sd15"]),
        unet_schema(UNETS["sd15"], control=False, images=False),
        *(replace(SD15, inputs=(each, *SD15.inputs[1:])) for each in changed),
        replace(SD15, outputs=(*SD15.outputs, Slot("more", ("batch",)))),
        *(schema for name, schema in SCHEMAS.items() if name not in ("sd15", "ssd-1b", "vega")),  # SDXL's from outside
    ]
    digests = [schema.digest for schema in variants]
    assert all(len(digest) == 8 for digest in digests)
    assert len(set(digests)) == len(digests)
    assert unet_schema(UNETS["sd15"], images=False).digest == SD15.digest
    assert unet_schema(UNETS["vega"], images=False).digest == SDXL.digest
