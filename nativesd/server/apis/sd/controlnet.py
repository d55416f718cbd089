"""The ControlNet extension's API: its lists, its preprocessors, and the units that requests carry.

Names, defaults and words are those of Mikubill/sd-webui-controlnet (internal_controlnet/external_code.py,
scripts/api.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nativesd.diffusion.control import Control
from nativesd.errors import UsageError
from nativesd.pictures.images import Fit, fit, read_image
from nativesd.pictures.preprocess import canny
from nativesd.pipeline.asked.readers import flag, real, shown, whole
from nativesd.server.apis.sd.style import answered
from nativesd.server.context import Context, context_of
from nativesd.server.wire.answers import answering, json_answer
from nativesd.server.wire.bodies import Intake, data_of, read_object
from nativesd.server.wire.fields import listed, mapping, words

MODULES = ("none", "canny")
VERSION = 3
MOST_UNITS = 10
MODES: Mapping[str, Fit] = {"just resize": "resize", "crop and resize": "crop", "resize and fill": "fill"}
MODE_NUMBERS = tuple(MODES)
DEFAULT_RESOLUTIONS = (-1, 64, 512)
"""Of preprocessors, in the extension's versions."""
UNHEEDED = ("mask", "mask_image", "effective_region_mask", "ipadapter_input")
IMPORTANCE = ("balanced", "my prompt is more important", "controlnet is more important")


def routes() -> list[Route]:
    """The API's addresses."""
    return [
        Route("/controlnet/version", version),
        Route("/controlnet/model_list", model_list),
        Route("/controlnet/module_list", module_list),
        Route("/controlnet/control_types", control_types),
        Route("/controlnet/settings", settings),
        Route("/controlnet/detect", detect, methods=["POST"]),
    ]


@answering(answered)
async def version(_request: Request) -> Response:
    """The extension's version of the API."""
    return json_answer({"version": VERSION})


@answering(answered)
async def model_list(request: Request) -> Response:
    """ControlNets and T2I-Adapters by name."""
    return json_answer({"model_list": list(context_of(request).catalogue.controls)})


@answering(answered)
async def module_list(_request: Request) -> Response:
    """Preprocessors."""
    return json_answer({"module_list": list(MODULES), "module_detail": {name: {"sliders": []} for name in MODULES}})


@answering(answered)
async def control_types(request: Request) -> Response:
    """Preprocessors and models that go together: here all of them."""
    models = list(context_of(request).catalogue.controls)
    everything = {
        "module_list": list(MODULES), "model_list": ["None", *models],
        "default_option": "none", "default_model": models[0] if models else "None",
    }  # fmt: skip
    return json_answer({"control_types": {"All": everything, "Canny": {**everything, "default_option": "canny"}}})


@answering(answered)
async def settings(_request: Request) -> Response:
    """How many units a request may have."""
    return json_answer({"control_net_unit_count": MOST_UNITS})


@answering(answered)
async def detect(request: Request) -> Response:
    """What a preprocessor makes of pictures."""
    body, intake = await read_object(request), context_of(request).intake()
    module = words("controlnet_module", body.get("controlnet_module", "none"))
    if module not in MODULES:
        raise UsageError(f"controlnet_module must be {' or '.join(MODULES)}, not {shown(module)}")
    given = listed("controlnet_input_images", body.get("controlnet_input_images", body.get("controlnet_images", [])))
    low, high = (_threshold(body, f"controlnet_threshold_{side}") for side in "ab")

    def made() -> list[str]:
        pictures = [read_image(intake.picture("controlnet_input_images", value)) for value in given]
        return [_png(_hint(picture, module, low, high)) for picture in pictures]

    return json_answer({"images": await run_in_threadpool(made), "info": "Success"})


def read_controls(
    units: list[Any], context: Context, intake: Intake, size: tuple[int | None, int | None], unheeded: list[str]
) -> dict[str, Any]:
    """The options `control` and `guess_mode` of the units of a request, which is for pictures of a size.

    Raises UsageError that names the field.
    """
    controls, guesses = [], set()
    for number, unit in enumerate(units):
        where = f"alwayson_scripts.controlnet.args[{number}]"
        fields = {name: value for name, value in mapping(where, unit).items() if value is not None}
        if not flag(f"{where}.enabled", fields.get("enabled", True)):
            continue
        if fields.get("model", "None") in ("None", "none", ""):
            unheeded.append(f"{where} (it names no model)")
            continue
        control, importance = _control(fields, where, context, intake, size, unheeded)
        controls.append(control)
        guesses.add(importance == IMPORTANCE[2])
        if importance == IMPORTANCE[1]:
            unheeded.append(f"{where}.control_mode {IMPORTANCE[1]} (taken: balanced)")
    if len(controls) > MOST_UNITS:
        raise UsageError(f"alwayson_scripts may have {MOST_UNITS} units of ControlNet, not {len(controls)}")
    if len(guesses) > 1:
        raise UsageError("alwayson_scripts: control_mode must be the same for all units of ControlNet")
    return {} if not controls else {"control": controls, **({"guess_mode": True} if True in guesses else {})}


def _control(
    fields: Mapping[str, Any],
    where: str,
    context: Context,
    intake: Intake,
    size: tuple[int | None, int | None],
    unheeded: list[str],
) -> tuple[Control, str]:
    given = fields.get("image") or fields.get("input_image")
    if isinstance(given, dict):  # gradio's: the picture, and a mask on it
        given = given.get("image")
    if not given:
        raise UsageError(f"{where}.image must be a picture in base64")
    picture = read_image(intake.picture(f"{where}.image", given))
    module = words(f"{where}.module", fields.get("module", "none")).lower()
    if module not in MODULES:
        raise UsageError(f"{where}.module must be {' or '.join(MODULES)}, not {shown(module)}")
    hint = _hint(picture, module, _threshold(fields, "threshold_a"), _threshold(fields, "threshold_b"))
    mode = MODES[_word(f"{where}.resize_mode", fields.get("resize_mode", 1), MODE_NUMBERS)]
    width, height = size
    if mode != "resize" and width is not None and height is not None:
        hint = fit(hint, width, height, mode).image
    unheeded += [f"{where}.{name}" for name in UNHEEDED if fields.get(name)]
    if module != "none":  # edges are found in the picture as it is
        if fields.get("pixel_perfect"):
            unheeded.append(f"{where}.pixel_perfect")
        if fields.get("processor_res", -1) not in DEFAULT_RESOLUTIONS:
            unheeded.append(f"{where}.processor_res")
    if str(fields.get("hr_option", "Both")) not in ("Both", "HiResFixOption.BOTH", "0"):
        unheeded.append(f"{where}.hr_option (taken: Both)")
    control = Control(
        context.catalogue.control(words(f"{where}.model", fields["model"])),
        hint,
        scale=real(-2, 2)(f"{where}.weight", fields.get("weight", 1.0)),
        start=real(0, 1)(f"{where}.guidance_start", fields.get("guidance_start", 0.0)),
        end=real(0, 1)(f"{where}.guidance_end", fields.get("guidance_end", 1.0)),
    )
    if control.start > control.end:
        raise UsageError(f"{where}.guidance_start must be before guidance_end")
    return control, _word(f"{where}.control_mode", fields.get("control_mode", 0), IMPORTANCE)


def _word(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """One of several words, in any case or by its number."""
    if isinstance(value, str) and value.lower() in allowed:
        return value.lower()
    if isinstance(value, int) and not isinstance(value, bool):
        return allowed[whole(0, len(allowed) - 1)(name, value)]
    raise UsageError(f"{name} must be one of {', '.join(allowed)}, not {shown(value)}")


def _threshold(fields: Mapping[str, Any], name: str) -> int | None:
    """A threshold of edges; below 0, and missing: the preprocessor's own."""
    value = real(-1, 1e6)(name, fields.get(name, -1))
    return None if value < 0 else int(value)


def _hint(picture: Image.Image, module: str, low: int | None, high: int | None) -> Image.Image:
    if module == "none":
        return picture
    return canny(picture, 100 if low is None else low, 200 if high is None else high)


def _png(picture: Image.Image) -> str:
    data = BytesIO()
    picture.save(data, format="PNG")
    return data_of(data.getvalue())
