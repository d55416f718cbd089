"""What a single file says of its noise, heads and steps: by marker tensors, the .yaml beside it, metadata, its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from nativesd.config import Prediction, UNetConfig
from nativesd.weights.files.beside import Beside
from nativesd.weights.identity.evidence import Evidence

EDM_V = ("edm_vpred.sigma_max", "edm_vpred.sigma_min")
"""CosXL's two numbers: the ends of its continuous sigmas."""
EDM_LATENTS = ("edm_mean", "edm_std")
"""Playground 2.5's: its latents' mean and standard deviation per channel."""
MARKERS = ("v_pred", "ztsnr", *EDM_V, *EDM_LATENTS, "denoiser.sigmas")
"""Tensors beside the components that say how the model is sampled."""

PREDICTIONS: Mapping[str, Prediction] = {
    "v": "v", "v_prediction": "v", "v-prediction": "v", "vpred": "v", "epsilon": "epsilon", "eps": "epsilon",
}  # fmt: skip
STATED_PREDICTION = ("modelspec.predict_key", "modelspec.prediction_type")
"""Metadata that names what is predicted (github.com/Stability-AI/ModelSpec; sai_model_spec.py of kohya-ss/sd-scripts
writes the second)."""


def prediction(
    keys: Iterable[str],
    family: str,
    variant: str,
    metadata: Mapping[str, str] | None = None,
    beside: Beside | None = None,
) -> tuple[Prediction, Evidence]:
    """What the UNet predicts: marker tensors decide, then the .yaml beside the file, then the metadata; else it is the
    family's usual."""
    names, said = set(keys), metadata or {}
    if EDM_LATENTS[0] in names:
        return "epsilon", Evidence("prediction", "epsilon", f"EDM's own, as the marker {EDM_LATENTS[0]} says")
    if marker := next((name for name in ("v_pred", *EDM_V) if name in names), None):
        return "v", Evidence("prediction", "v", f"the marker {marker}")
    if beside is not None and beside.prediction is not None:
        return beside.prediction, Evidence("prediction", beside.prediction, f"{beside.name} beside the file")
    for field in STATED_PREDICTION:
        if (value := PREDICTIONS.get(said.get(field, "").strip().lower())) is not None:
            return value, Evidence("prediction", value, f"the metadata's {field}")
    if said.get("ss_v_parameterization") == "True":
        return "v", Evidence("prediction", "v", "the metadata's ss_v_parameterization")
    override = 'prediction="epsilon" or "v" (--prediction)'
    if family == "sd2" and not variant and "denoiser.sigmas" not in names:
        why = "SD2.1-768 and SD2.1-base have the same names and shapes; this is the former's"
        return "v", Evidence("prediction", "v", why, False, override)
    return "epsilon", Evidence("prediction", "epsilon", "no marker tensor says otherwise", False, override)


def with_beside(
    unet: UNetConfig, evidence: list[Evidence], beside: Beside
) -> tuple[UNetConfig, list[Evidence], Beside | None]:
    """The configuration with the heads that the .yaml beside the file says; one of another UNet does not count."""
    of_tensors = {
        "model_channels": unet.levels[0].width, "in_channels": unet.in_channels, "context": unet.context,
    }  # fmt: skip
    said = {name: getattr(beside, name) for name in of_tensors}
    if wrong := [name for name, value in said.items() if value not in (None, of_tensors[name])]:
        [name, *_] = wrong
        why = f"it says {name} {said[name]}, the tensors have {of_tensors[name]}: it is another model's"
        return unet, [*evidence, Evidence("beside", f"{beside.name} is not used", why)], None
    heads = [
        beside.heads or (level.width // beside.head_width if beside.head_width else level.heads)
        for level in unet.levels
    ]
    if not all(count > 0 and level.width % count == 0 for count, level in zip(heads, unet.levels, strict=True)):
        why = f"its {'/'.join(map(str, heads))} heads do not divide the levels: it is another model's"
        return unet, [*evidence, Evidence("beside", f"{beside.name} is not used", why)], None
    if beside.heads or beside.head_width:
        levels = tuple(replace(level, heads=count) for level, count in zip(unet.levels, heads, strict=True))
        unet = replace(unet, levels=levels)
        stated = Evidence("heads", "/".join(map(str, heads)), f"{beside.name} beside the file")
        evidence = [stated if entry.what == "heads" else entry for entry in evidence]
    return unet, evidence, beside


@dataclass(frozen=True)
class FewSteps:
    """A distilled model: by which word, for how many steps, and what says so."""

    word: str
    steps: int
    why: str
    sample: bool
    """Whether it predicts the clean latents ("x0")"""


FEW_STEPS = {"turbo": 4, "lightning": 4, "hyper": 8, "lcm": 4}
"""Distilled models by a word in their names, and how many steps they are made for where the name does not say."""
TITLES = ("modelspec.title", "ss_output_name")
"""Metadata that names the model"""


def few_steps(stem: str, metadata: Mapping[str, str] | None = None) -> FewSteps | None:
    """What a file's name, or the title in its metadata, says of a distilled model; None where neither does.

    Whole words count, which capitals and digits part too: `v21TurboDPMSDE` has turbo, `realCMix` no lcm. "Hyper" is an
    adjective as well, so it counts with a number of steps or before "SD" only.
    """
    said = metadata or {}
    for where, text in (("name", stem), *(("title", said[field]) for field in TITLES if field in said)):
        words = [word.lower() for word in _WORD.findall(text)]
        stated = re.search(r"(\d+)[-_ ]?steps?(?![a-z])", text.lower())
        for word, usual in FEW_STEPS.items():
            if word not in words:
                continue
            following = words[words.index(word) + 1 :]
            if word == "hyper" and not stated and not (following and following[0].startswith("sd")):
                continue
            steps = int(stated[1]) if stated else usual
            return FewSteps(word, steps, f"the file's {where} says {word}", "x0" in re.split(r"[\W_]+", text.lower()))
    return None


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
