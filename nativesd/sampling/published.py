"""Schedulers as they are published: what a scheduler_config.json says, field by field, honoured or refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from nativesd.config import Prediction
from nativesd.errors import NativesdWarning, SourceError, quote
from nativesd.schema import Field, many, number, one_of, read_fields, text, truth, whole

Spacing = Literal["leading", "trailing", "linspace", "skipping"]
"""The spacings of Lin et al. 2023, table 2, and LCM's, which skips through the distilled model's own steps."""

Kind = Literal[
    "automatic", "normal", "karras", "exponential", "sgm uniform", "simple", "beta", "align your steps", "trailing",
    "leading", "linspace", "lu", "polyexponential", "kl optimal", "linear quadratic", "ddim uniform",
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
        said = read_fields(data, FIELDS, FILE)
        name = said["_class_name"]
        edm = _edm(name, data)
        if edm is not None:
            name = EDM_CLASSES[name]
            data = {field: value for field, value in data.items() if field not in _EDM_READ}
        for field, allowed in _NOISE.items():
            if data.get(field, allowed[0]) not in allowed:
                raise SourceError(f"{FILE}: {field} = {quote(data[field])} is not supported")
        unsupported = [
            f"{field} = {quote(data[field])}"
            for field, allowed in _SAMPLER.items()
            if data.get(field, allowed[0]) not in allowed
        ]
        named = {field.name for field in FIELDS}
        if unknown := sorted(data.keys() - named - _NOISE.keys() - _SAMPLER.keys() - _HARMLESS):
            listed = quote(", ".join(unknown))[1:-1]
            warnings.warn(f"{FILE}: not understood and not used: {listed}", NativesdWarning, stacklevel=2)
        spacing = data.get("timestep_spacing")
        if name == "PNDMScheduler" and not said["skip_prk_steps"]:
            unsupported.append("skip_prk_steps = False")
        kinds = [kind for kind, field in _KINDS.items() if said[field]]
        if len(kinds) > 1:
            unsupported.append(f"{' and '.join(kinds)} sigmas at once")
        betas = said["trained_betas"]
        steps = said["num_train_timesteps"] or (1000 if betas is None else len(betas))
        if betas is not None and len(betas) != steps:
            raise SourceError(f"{FILE}: trained_betas has {len(betas)} numbers for num_train_timesteps = {steps}")
        usual = _USUAL | _DEFAULTS.get(name, {})
        own = {field: usual[field] if said[field] is None else said[field] for field in usual}
        return cls(
            class_name=name + _form(name, said["algorithm_type"], own["solver_order"]),
            train_steps=steps,
            beta_start=own["beta_start"],
            beta_end=own["beta_end"],
            beta_schedule=data.get("beta_schedule", own["beta_schedule"]),
            trained_betas=betas,
            prediction=PREDICTIONS[said["prediction_type"]],
            spacing=cast("Spacing", spacing) if spacing in _SAMPLER["timestep_spacing"] else None,
            steps_offset=said["steps_offset"],
            set_alpha_to_one=name != "PNDMScheduler" if said["set_alpha_to_one"] is None else said["set_alpha_to_one"],
            final_sigma_zero=data.get("final_sigmas_type", "zero") == "zero",
            kind=cast("Kind", kinds[0]) if kinds else "automatic",
            zero_snr=said["rescale_betas_zero_snr"],
            order=own["solver_order"],
            solver=said["solver_type"],
            lower_order_final=own["lower_order_final"],
            euler_at_final=said["euler_at_final"],
            original_steps=said["original_inference_steps"],
            timestep_scaling=said["timestep_scaling"],
            edm=edm,
            unsupported=tuple(unsupported),
        )


EDM_CLASSES = {
    "EDMEulerScheduler": "EulerDiscreteScheduler", "EDMDPMSolverMultistepScheduler": "DPMSolverMultistepScheduler",
}  # fmt: skip
"""The published classes of continuous sigmas, and those of the same samplers over trained timesteps"""
_EDM_FIELDS = (
    Field("sigma_min", number(1e-6, 1e6), EDM.smallest),
    Field("sigma_max", number(1e-6, 1e6), EDM.largest),
    Field("sigma_data", number(1e-6, 1e6), EDM.data),
    Field("sigma_schedule", one_of("karras", "exponential"), EDM.kind),
    Field("rho", number(0.01, 1000), EDM.rho),
)
_EDM_READ = {field.name for field in _EDM_FIELDS}


def _edm(name: str, data: Mapping[str, Any]) -> EDM | None:
    """The continuous sigmas of an EDM scheduler. Raises SourceError."""
    if name not in EDM_CLASSES:
        return None
    edm = EDM(*read_fields(data, _EDM_FIELDS, FILE).values())
    if edm.smallest >= edm.largest:
        raise SourceError(f"{FILE}: no sigmas from {edm.largest} to {edm.smallest}")
    return edm


def _form(name: str, algorithm: str | None, order: int) -> str:
    """What tells the samplers of one published class apart, in brackets behind its name; empty for its own default."""
    form = [] if algorithm in (None, "dpmsolver++", "deis", "data_prediction") else [str(algorithm)]
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
_USUAL: dict[str, Any] = {
    "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "solver_order": 2, "lower_order_final": True,
}  # fmt: skip
"""DDPM's defaults of the fields that not all published classes have alike."""
FILE = "scheduler_config.json"
_BETA = number(1e-8, 0.9999)
FIELDS = (
    Field("_class_name", text(), "DDIMScheduler"),
    Field("num_train_timesteps", whole(2, 100_000)),
    Field("beta_start", _BETA),
    Field("beta_end", _BETA),
    Field("beta_schedule", text()),
    Field("trained_betas", many(_BETA, 100_000)),
    Field("prediction_type", one_of(*PREDICTIONS), "epsilon"),
    Field("steps_offset", whole(0, 1000), 0),
    Field("set_alpha_to_one", truth()),
    Field("rescale_betas_zero_snr", truth(), False),
    Field("solver_order", whole(1, 100)),
    Field("solver_type", text()),
    Field("algorithm_type", text()),
    Field("lower_order_final", truth()),
    Field("euler_at_final", truth(), False),
    Field("original_inference_steps", whole(1, 1000), 50),
    Field("timestep_scaling", number(0, 1e6), 10.0),
    Field("skip_prk_steps", truth(), False),
    *(Field(field, truth(), False) for field in _KINDS.values()),
)
"""The fields that are honoured; those below are only known, in their usual values."""
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
    "predictor_order": (2,),
    "corrector_order": (2,),
    "tau_func": (None,),
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
