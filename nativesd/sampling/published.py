"""Schedulers as they are published: what a scheduler_config.json says, field by field, honoured or refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from nativesd.config import Prediction
from nativesd.errors import NativesdWarning, SourceError

Spacing = Literal["leading", "trailing", "linspace", "skipping"]
"""The spacings of Lin et al. 2023, table 2, and LCM's, which skips through the distilled model's own steps."""

Kind = Literal[
    "automatic", "normal", "karras", "exponential", "sgm uniform", "simple", "beta", "align your steps", "trailing",
    "leading", "linspace", "lu",
]  # fmt: skip
"""A schedule by name. "automatic" is the model's own."""

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


@dataclass(frozen=True)
class EDM:
    """Noise without trained timesteps (Karras et al. 2022, section 5): sigmas from `largest` to `smallest`, and
    latents of standard deviation `data`. The UNet is told 0.25 log sigma."""

    smallest: float = 0.002
    largest: float = 80.0
    data: float = 0.5
    kind: Literal["karras", "exponential"] = "karras"
    rho: float = 7.0


@dataclass(frozen=True)
class SchedulerConfig:
    """What a published scheduler_config.json says of the noise. The defaults are Stable Diffusion's own values.

    `set_alpha_to_one` false means that DDIM and PNDM end at the smallest trained sigma, not at zero.
    """

    class_name: str = "DDIMScheduler"
    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    prediction: Prediction = "epsilon"
    spacing: Spacing | None = None
    """None: absent from the file, so each sampler's own default holds."""
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    final_sigma_zero: bool = True
    kind: Kind = "automatic"
    """"karras", "exponential" or "beta" where the file asks for these."""
    zero_snr: bool = False
    """Betas rescaled so that the last timestep is noise alone (Lin et al. 2023, algorithm 1)."""
    order: int = 2
    solver: str | None = None
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_steps: int = 50
    timestep_scaling: float = 10.0
    edm: EDM | None = None
    """Set for a model of continuous sigmas (CosXL, Playground 2.5), which has no betas"""
    unsupported: tuple[str, ...] = ()
    """Fields of the published sampler that this version has no equal for, each as "name = value"."""

    @classmethod
    def from_published(cls, data: Mapping[str, Any]) -> SchedulerConfig:
        """Read scheduler_config.json; absent fields take the published classes' defaults.

        Raises SourceError for what the model's own noise cannot be here; what concerns the published sampler alone is
        left in `unsupported`, as another sampler may be asked for. Warns of a field that is not understood.
        """
        name = data.get("_class_name", "DDIMScheduler")
        edm = _edm(name, data)
        if edm is not None:
            name = _EDM[name]
            data = {field: value for field, value in data.items() if field not in _EDM_READ}
        for field, allowed in _NOISE.items():
            if data.get(field, allowed[0]) not in allowed:
                raise SourceError(f"scheduler_config.json: {field} = {data[field]!r} is not supported")
        unsupported = [
            f"{field} = {data[field]!r}"
            for field, allowed in _SAMPLER.items()
            if data.get(field, allowed[0]) not in allowed
        ]
        if unknown := sorted(data.keys() - _READ - _NOISE.keys() - _SAMPLER.keys() - _HARMLESS):
            warnings.warn(
                f"scheduler_config.json: not understood and not used: {', '.join(unknown)}",
                NativesdWarning,
                stacklevel=2,
            )
        prediction = data.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise SourceError(
                f"scheduler_config.json: prediction_type = {prediction!r} is not one of {', '.join(PREDICTIONS)}"
            )
        spacing = data.get("timestep_spacing")
        if name == "PNDMScheduler" and not data.get("skip_prk_steps", False):
            unsupported.append("skip_prk_steps = False")
        betas = data.get("trained_betas")
        defaults = _DEFAULTS.get(name, {})
        kinds = [kind for kind, field in _KINDS.items() if data.get(field)]
        if len(kinds) > 1:
            unsupported.append(f"{' and '.join(kinds)} sigmas at once")
        order = data.get("solver_order", defaults.get("solver_order", 2))
        return cls(
            class_name=name + _form(name, data.get("algorithm_type"), order),
            train_steps=data.get("num_train_timesteps", 1000),
            beta_start=data.get("beta_start", defaults.get("beta_start", 0.0001)),
            beta_end=data.get("beta_end", defaults.get("beta_end", 0.02)),
            beta_schedule=data.get("beta_schedule", defaults.get("beta_schedule", "linear")),
            trained_betas=None if betas is None else tuple(betas),
            prediction=PREDICTIONS[prediction],
            spacing=cast("Spacing", spacing) if spacing in _SAMPLER["timestep_spacing"] else None,
            steps_offset=data.get("steps_offset", 0),
            set_alpha_to_one=data.get("set_alpha_to_one", name != "PNDMScheduler"),
            final_sigma_zero=data.get("final_sigmas_type", "zero") == "zero",
            kind=cast("Kind", kinds[0]) if kinds else "automatic",
            zero_snr=bool(data.get("rescale_betas_zero_snr", False)),
            order=order,
            solver=data.get("solver_type"),
            lower_order_final=data.get("lower_order_final", defaults.get("lower_order_final", True)),
            euler_at_final=data.get("euler_at_final", False),
            original_steps=data.get("original_inference_steps", 50),
            timestep_scaling=data.get("timestep_scaling", 10.0),
            edm=edm,
            unsupported=tuple(unsupported),
        )


_EDM = {
    "EDMEulerScheduler": "EulerDiscreteScheduler", "EDMDPMSolverMultistepScheduler": "DPMSolverMultistepScheduler",
}  # fmt: skip
"""The published classes of continuous sigmas, and those of the same samplers over trained timesteps"""
_EDM_READ = {"sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho"}


def _edm(name: str, data: Mapping[str, Any]) -> EDM | None:
    """The continuous sigmas of an EDM scheduler. Raises SourceError."""
    if name not in _EDM:
        return None
    kind = data.get("sigma_schedule", "karras")
    if kind not in ("karras", "exponential"):
        raise SourceError(f"scheduler_config.json: sigma_schedule = {kind!r} is not karras or exponential")
    edm = EDM(
        smallest=data.get("sigma_min", EDM.smallest), largest=data.get("sigma_max", EDM.largest),
        data=data.get("sigma_data", EDM.data), kind=kind, rho=data.get("rho", EDM.rho),
    )  # fmt: skip
    if not 0 < edm.smallest < edm.largest or edm.data <= 0:
        raise SourceError(f"scheduler_config.json: no sigmas from {edm.largest} to {edm.smallest} for data {edm.data}")
    return edm


def _form(name: str, algorithm: str | None, order: int) -> str:
    """What tells the samplers of one published class apart, in brackets behind its name; empty for its own default."""
    form = [] if algorithm in (None, "dpmsolver++", "deis") else [str(algorithm)]
    if name == "DPMSolverMultistepScheduler" and order != 2 and algorithm != "dpmsolver":
        form.append(f"order {order}")
    return f"[{', '.join(form)}]" if form else ""


_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
         "DPMSolverSDEScheduler"), _SD_BETAS),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), _SD_BETAS | {"beta_schedule": "scaled_linear"}),
    "DPMSolverSinglestepScheduler": {"lower_order_final": False},
}  # fmt: skip
"""Where a published class's defaults are not DDPM's, or the multistep ones'."""

_KINDS = {
    "karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}  # fmt: skip
"""Schedules, and the fields that ask for them."""
_READ = {
    "_class_name", "num_train_timesteps", "beta_start", "beta_end", "trained_betas", "prediction_type",
    "steps_offset", "set_alpha_to_one", "rescale_betas_zero_snr", "lower_order_final", "euler_at_final",
    "original_inference_steps", "timestep_scaling", "algorithm_type", "skip_prk_steps", *_KINDS.values(),
}  # fmt: skip
_NOISE: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("scaled_linear", "linear"),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "shift_terminal": (None,),
}
"""Fields of the noise that a model was trained with, and the values that are known here."""
_SAMPLER: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": (None, "leading", "trailing", "linspace"),
    "interpolation_type": ("linear",),
    "thresholding": (False, None),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "solver_order": (2, 1, 3),
    "variance_type": ("fixed_small", "fixed_small_log", None),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "noise_sampler_seed": (None,),
}
"""Fields of the published sampler that would change the picture, and the values that are known here."""
_HARMLESS = {
    "_diffusers_version", "dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "flow_shift",
    "time_shift_type", "lambda_min_clipped",
    "clip_sample",  # the published pipelines switch it off, whatever the file says
}  # fmt: skip
