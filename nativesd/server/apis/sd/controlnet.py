"""The ControlNet extension's API: its lists, its preprocessors, and the units that requests carry.

Names, defaults and words are those of Mikubill/sd-webui-controlnet (internal_controlnet/external_code.py and args.py,
scripts/api.py), of whose units some are IP-Adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nativesd.diffusion.control import Control
from nativesd.diffusion.images.prompts import ImagePrompt
from nativesd.errors import UsageError
from nativesd.pictures.images import Fit, fit, read_image
from nativesd.pictures.preprocess import canny
from nativesd.pipeline.asked.readers import flag, real, shown, whole
from nativesd.server.apis.sd.style import answered
from nativesd.server.context import Context, context_of
from nativesd.server.jobs.shelf import Catalogue
from nativesd.server.wire.answers import answering, json_answer
from nativesd.server.wire.bodies import Intake, data_of, read_object
from nativesd.server.wire.fields import listed, mapping, words

MODULES = ("none", "canny")
AUTO = "ip-adapter-auto"
IMAGE_MODULES = (
    AUTO, "ip-adapter_clip_sd15", "ip-adapter_clip_sdxl", "ip-adapter_clip_sdxl_plus_vith", "ip-adapter_clip_h",
    "ip-adapter_clip_g", "clip-vit-h (ipadapter)", "clip-vit-bigg (ipadapter)",
)  # fmt: skip
"""Of IP-Adapters, the last two in Forge. Which image encoder is asked, the adapter says."""
FACE_MODULES = (
    "ip-adapter_face_id", "ip-adapter_face_id_plus", "ip-adapter_pulid", "instant_id_face_embedding",
    "insightface (instantid)", "insightface+clip-h (ipadapter)",
)  # fmt: skip
TRANSFORMERS = {16: (6, 9), 11: (4, 6)}
"""How many of a UNet's transformers are before and behind its middle, by how many weights a unit gives (args.py)."""
VERSION = 3
MOST_UNITS = 10
MODES: Mapping[str, Fit] = {"just resize": "resize", "crop and resize": "crop", "resize and fill": "fill"}
MODE_NUMBERS = tuple(MODES)
DEFAULT_RESOLUTIONS = (-1, 64, 512)
"""Of preprocessors, in the extension's versions."""
UNHEEDED = ("mask", "mask_image", "effective_region_mask", "ipadapter_input", "advanced_weighting")
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
    """ControlNets, T2I-Adapters and IP-Adapters by name."""
    return json_answer({"model_list": _models(context_of(request).catalogue)})


@answering(answered)
async def module_list(request: Request) -> Response:
    """Preprocessors; those of IP-Adapters where there are such."""
    names = _modules(context_of(request).catalogue)
    return json_answer({"module_list": names, "module_detail": {name: {"sliders": []} for name in names}})


@answering(answered)
async def control_types(request: Request) -> Response:
    """Preprocessors and models that go together: all that there are, all ControlNets, and all IP-Adapters."""
    catalogue = context_of(request).catalogue
    controls, adapters = list(catalogue.controls), list(catalogue.image_adapters)
    types = {
        "All": _control_type(_modules(catalogue), _models(catalogue), "none", "None"),
        "Canny": _control_type(MODULES, controls, "canny", *controls[:1]),
    }
    if adapters:
        types["IP-Adapter"] = _control_type(IMAGE_MODULES, adapters, AUTO, adapters[0])
    return json_answer({"control_types": types})


def _control_type(modules: Sequence[str], models: Sequence[str], default: str, model: str = "None") -> dict[str, Any]:
    return {
        "module_list": list(modules), "model_list": ["None", *models], "default_option": default,
        "default_model": model,
    }  # fmt: skip


def _models(catalogue: Catalogue) -> list[str]:
    return [*catalogue.controls, *catalogue.image_adapters]


def _modules(catalogue: Catalogue) -> list[str]:
    return [*MODULES, *(IMAGE_MODULES if catalogue.image_adapters else ())]


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


def read_units(
    units: list[Any], context: Context, intake: Intake, size: tuple[int | None, int | None], unheeded: list[str]
) -> dict[str, Any]:
    """The options `control`, `guess_mode` and `image_prompts` of the units of a request, for pictures of a size.

    Raises UsageError that names the field.
    """
    controls, guesses, prompts = [], set(), []
    for number, unit in enumerate(units):
        where = f"alwayson_scripts.controlnet.args[{number}]"
        fields = {name: value for name, value in mapping(where, unit).items() if value is not None}
        if not flag(f"{where}.enabled", fields.get("enabled", True)):
            continue
        if fields.get("model", "None") in ("None", "none", ""):
            unheeded.append(f"{where} (it names no model)")
            continue
        module = words(f"{where}.module", fields.get("module", "none")).lower()
        if module in FACE_MODULES:
            raise UsageError(f"{where}.module {module} asks a face recogniser, and there is none here")
        if module in IMAGE_MODULES:
            prompts.append(_image_prompt(fields, where, context, intake, unheeded))
            continue
        control, importance = _control(fields, where, context, intake, size, unheeded)
        controls.append(control)
        guesses.add(importance == IMPORTANCE[2])
        if importance == IMPORTANCE[1]:
            unheeded.append(f"{where}.control_mode {IMPORTANCE[1]} (taken: balanced)")
    if len(controls) + len(prompts) > MOST_UNITS:
        raise UsageError(
            f"alwayson_scripts may have {MOST_UNITS} units of ControlNet, not {len(controls) + len(prompts)}"
        )
    if len(guesses) > 1:
        raise UsageError("alwayson_scripts: control_mode must be the same for all units of ControlNet")
    options: dict[str, Any] = {"control": controls} if controls else {}
    if True in guesses:
        options["guess_mode"] = True
    return options | ({"image_prompts": prompts} if prompts else {})


def _image_prompt(
    fields: Mapping[str, Any], where: str, context: Context, intake: Intake, unheeded: list[str]
) -> ImagePrompt:
    """A unit whose module is an IP-Adapter's. As there, its resize mode and importance mean nothing."""
    if fields.get("ipadapter_input"):
        raise UsageError(f"{where}.ipadapter_input is a pickle, which is not opened here: send the picture as image")
    given = fields.get("image") or fields.get("input_image")
    several = given if isinstance(given, list) else [given]
    if len(several) == 2 and isinstance(several[0], str):  # a picture and a mask on it
        several = several[:1]
    pictures = []
    for each in several:
        each = each.get("image") if isinstance(each, dict) else each
        if not each:
            raise UsageError(f"{where}.image must be a picture in base64, or a list of objects with one")
        pictures.append(intake.picture(f"{where}.image", each))
    if len(pictures) > 1:
        unheeded.append(f"{where}.image (taken: {len(pictures)} pictures together, not their mean)")
    masked = any(isinstance(each, dict) and each.get("mask") for each in several)
    unheeded += [
        f"{where}.{name}" for name in ("mask", "mask_image") if fields.get(name) or (masked and name == "mask")
    ]
    _note_hires(fields, where, unheeded)
    mask = fields.get("effective_region_mask")
    scale, start, end = _strength(fields, where)
    layers = None
    if (weights := fields.get("advanced_weighting")) is not None:
        layers, scale = _layers(f"{where}.advanced_weighting", weights), 1.0  # weight is not heeded there either
    return ImagePrompt(
        context.catalogue.image_adapter(words(f"{where}.model", fields["model"])),
        pictures[0] if len(pictures) == 1 else list(pictures),
        scale, start, end, layers,
        mask=None if not mask else intake.picture(f"{where}.effective_region_mask", mask),
    )  # fmt: skip


def _layers(name: str, value: Any) -> dict[int, float]:
    """Weights of the transformers in the order before, behind and in the middle, by their numbers on the data's way."""
    weights = [real(-10, 10)(name, weight) for weight in listed(name, value)]
    if len(weights) not in TRANSFORMERS:
        raise UsageError(f"{name} must be 16 numbers for SD1.x, 11 for SDXL, not {len(weights)}")
    before, behind = TRANSFORMERS[len(weights)]
    return dict(enumerate([*weights[:before], weights[-1], *weights[before : before + behind]]))


def _strength(fields: Mapping[str, Any], where: str) -> tuple[float, float, float]:
    """Weight, begin and end of a unit."""
    scale = real(-2, 2)(f"{where}.weight", fields.get("weight", 1.0))
    start = real(0, 1)(f"{where}.guidance_start", fields.get("guidance_start", 0.0))
    end = real(0, 1)(f"{where}.guidance_end", fields.get("guidance_end", 1.0))
    if start > end:
        raise UsageError(f"{where}.guidance_start must be before guidance_end")
    return scale, start, end


def _note_hires(fields: Mapping[str, Any], where: str, unheeded: list[str]) -> None:
    """Note that a unit acts in both passes where it asks for one of them."""
    if str(fields.get("hr_option", "Both")) not in ("Both", "HiResFixOption.BOTH", "0"):
        unheeded.append(f"{where}.hr_option (taken: Both)")


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
        known = [*MODULES, *(IMAGE_MODULES[:1] if context.catalogue.image_adapters else ())]
        raise UsageError(f"{where}.module must be one of {', '.join(known)}, not {shown(module)}")
    model = words(f"{where}.model", fields["model"])
    if model in context.catalogue.image_adapters:
        raise UsageError(f"{where}.model {model} is an IP-Adapter, whose module is {AUTO}, not {shown(module)}")
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
    _note_hires(fields, where, unheeded)
    control = Control(context.catalogue.control(model), hint, *_strength(fields, where))
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
