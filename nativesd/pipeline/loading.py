"""A source (the embedded model, a folder, a single file, a hub id) to a Pipeline."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from nativesd.config import (
    ControlNetConfig,
    Prediction,
    T2IAdapterConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from nativesd.errors import NativesdWarning, SourceError, UsageError, WeightsError
from nativesd.models.clip import TextEncoder
from nativesd.models.controlnet import ControlNet, ControlNetUnion
from nativesd.models.t2i_adapter import T2IAdapter
from nativesd.models.tiny_vae import TinyVAE
from nativesd.models.unet import UNet
from nativesd.models.vae import VAE
from nativesd.pipeline.build import build
from nativesd.pipeline.control import ControlModel
from nativesd.pipeline.diffusion import PipelineConfig
from nativesd.pipeline.pipeline import Pipeline
from nativesd.sampling.published import SchedulerConfig
from nativesd.shipped import TINY
from nativesd.text.tokenizer import DEFAULT, ClipTokenizer, pad_id, pad_token
from nativesd.tuning.fp8 import is_fp8, use_fp8, why_not_fp8
from nativesd.tuning.tune import compile_blocks, tune
from nativesd.weights.audit import grouped
from nativesd.weights.checkpoint import fill
from nativesd.weights.files.folder import read_json
from nativesd.weights.files.source import Member, open_source
from nativesd.weights.lora.merge import Merged, host
from nativesd.weights.maps.describe import OWN_FORM, unet_family
from nativesd.weights.maps.describe import prediction as prediction_of
from nativesd.weights.maps.identify import Component, Identity, identify_all
from nativesd.weights.maps.keymap import KeyMap, load_tables
from nativesd.weights.maps.published import picture_size, scheduler_json

if TYPE_CHECKING:
    from nativesd.export.library import BackendName

LAST_TIMESTEP = 999.0
TINY_GUIDANCE = 3.0  # at 7.5 the embedded model's colours are over-saturated: backgrounds are right in 93 %, not 100 %
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """What is known of a source before a tensor is read: for every component, where it is and what it is."""

    path: Path
    family: str
    parts: Mapping[str, tuple[Member, Component]]
    scheduler: Mapping[str, Any]
    prediction_known: bool
    """Whether the source says what the UNet predicts; two forms of SD2.x have the same tensors."""
    size: int
    """Side, in latent cells, of the pictures the UNet was trained on."""
    zero_empty_negative: bool

    @classmethod
    def of(cls, path: Path, name: str, member: Member, component: Component) -> Model:
        """A component that stands alone."""
        config = component.config
        family = unet_family(config)[0] if isinstance(config, UNetConfig) else ""
        size = picture_size(family, "epsilon", config) if isinstance(config, UNetConfig) else 64
        return cls(path, family, {name: (member, component)}, {}, False, size, zero_empty_negative=False)

    @property
    def text_encoders(self) -> list[str]:
        """Their names, in the UNet's order."""
        return sorted(name for name in self.parts if name.startswith("text_encoder"))


def load(
    source: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    prediction: Prediction | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoders: Sequence[str | Path] = (),
    preview: str | Path | None = None,
    offload: bool = False,
    maps: str | Path | None = None,
    backend: Literal["torch"] | BackendName = "torch",
    engines: str | Path | None = None,
    fast: bool = True,
    compile: bool | Literal["auto"] = False,
    fp8: bool = False,
) -> Pipeline:
    """Load a model.

    source         "tiny" (the embedded model), a folder in the published layout, a single safetensors file of any
                   layout that the tables know, or a hub id such as "org/name"
    device         default: cuda where there is one, else cpu
    dtype          float16, bfloat16 or float32; default float16 on CUDA, float32 elsewhere
    prediction     "epsilon", "v" or "sample", where the source says it wrong or not at all
    unet, vae      files or folders with these components, instead of the source's; vae="taesd" is the family's TAESD
    text_encoders  the same for the text encoders; which is which is read off them
    preview        a TAESD ("taesd", or a file or folder) for the previews of `on_step`
    offload        keep the modules in main memory, and each on the device only while it is used
    maps           a folder of weight maps (*.toml) that add to the shipped ones or replace those of the same name
    backend        what runs the components: torch, or as in `Pipeline.accelerate`, which also says what engines is
    fast           compute by what a short probe finds faster here (`tuning.tune`): on a CPU other operators, on CUDA
                   maybe another layout of the weights
    compile        torch.compile the UNet's repeated block (`tuning.compile_blocks`), which the first picture waits for;
                   "auto": on CUDA, where Triton is installed. On a CPU `fast` alone is as fast
    fp8            keep and multiply the UNet's transformer blocks in float8 (`models.fp8`): less memory, larger errors,
                   no LoRAs. For GPUs of compute capability 8.9 (RTX 40, H100) and newer

    With all files local no request is made. Raises SourceError and WeightsError for what cannot be read or does not
    fit, NetworkError for the hub, UsageError for an argument that cannot be.
    """
    place = find_device(device)
    kind = _dtype(dtype, place)
    if prediction is not None and prediction not in get_args(Prediction):
        raise UsageError(f"prediction must be one of {', '.join(get_args(Prediction))}, not {prediction!r}")
    if fp8:
        _require_fp8(place, kind)
    half = kind != torch.float32
    tables = load_tables(None if maps is None else Path(maps))
    model = describe(
        locate(source, half=half), tables, unet=unet, others=[*([vae] if vae else []), *text_encoders], half=half
    )
    home = torch.device("cpu") if offload else place

    def make(member: Member, component: Component, dtype: torch.dtype) -> Any:
        module = build(component.config) if component.config is not None else None
        assert module is not None  # `describe` takes components with a module only
        fill(module, member, component, device=home, dtype=dtype)
        return module.eval()

    unet_module: UNet = make(*model.parts["unet"], kind)
    vae_config = model.parts["vae"][1].config
    upcast = isinstance(vae_config, VAEConfig) and vae_config.force_upcast and kind == torch.float16
    vae_module: VAE | TinyVAE = make(*model.parts["vae"], torch.float32 if upcast else kind)
    encoders: tuple[TextEncoder, ...] = tuple(make(*model.parts[name], kind) for name in model.text_encoders)
    fast = fast and home == place
    if fp8:
        use_fp8(unet_module)
        torch.cuda.empty_cache()  # what its weights took before
    if fast:
        tune(unet_module)
        tune(vae_module)
    if _compiles(compile, place):
        compile_blocks(unet_module)
    filled = {"unet": unet_module, **dict(zip(model.text_encoders, encoders, strict=True))}
    hosts = {name: host(module, *model.parts[name], tables) for name, module in filled.items()}
    previewer = None
    if preview is not None:
        (member,) = open_source(taesd(model.family) if preview == "taesd" else preview)
        previewer = make(member, identify_known(Path(preview), [member], tables)[0][1].components[0], kind)
        if not isinstance(previewer, TinyVAE):
            raise SourceError(f"{preview} is not a TAESD, so it makes no previews")
    name = Path(unet or source).stem if unet or Path(source).is_file() else ""
    scheduler, steps, inferred = settle_scheduler(model, unet_module, prediction, name)
    embedded = model.path == TINY
    config = PipelineConfig(
        name=Path(source).stem if Path(source).is_file() else Path(source).name,
        family=model.family,
        unet=unet_module.config,
        vae=vae_module.config,
        text_encoders=tuple(encoder.config for encoder in encoders),
        scheduler=scheduler,
        prediction=scheduler.prediction,
        size=picture_side(model, scheduler.prediction) * vae_module.config.factor,
        zero_empty_negative=model.zero_empty_negative,
        guidance_scale=TINY_GUIDANCE if embedded else None,
        steps=steps,
        inferred=inferred,
    )
    tokenizers = tuple(
        _tokenizer(model.path, name, encoder.config)
        for name, encoder in zip(model.text_encoders, encoders, strict=True)
    )
    pipeline = Pipeline(
        config,
        unet_module,
        vae_module,
        encoders,
        tokenizers,
        place,
        kind,
        offload=offload,
        previewer=previewer,
        lora_state=Merged(hosts),
        load_control=partial(load_control, device=home, dtype=kind, maps=maps, unet=unet_module, fast=fast),
    )
    return pipeline if backend == "torch" else pipeline.accelerate(backend, engines=engines)


def load_control(
    source: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    maps: str | Path | None = None,
    unet: UNet | None = None,
    fast: bool = True,
) -> ControlModel:
    """Load a ControlNet (plain or union) or a T2I-Adapter: "tiny" (edges, for the embedded model), a folder, a file, or
    a hub id.

    A single file does not say that it is a "shuffle" ControlNet, which is pooled: its name must. The options are those
    of `load`. `unet` is the model's, to which a ControlNet that was saved as a difference is
    added. Raises SourceError for what cannot be read or is neither.
    """
    place = find_device(device)
    kind = _dtype(dtype, place)
    path = TINY / "controlnet" if source == "tiny" else Path(source)
    if source != "tiny" and not path.exists() and isinstance(source, str) and HUB_ID.fullmatch(source):
        from nativesd.weights.files.hub import fetch_component

        path = fetch_component(source)
    for member, identity in identify_all(open_source(path), load_tables(None if maps is None else Path(maps))):
        for component in identity.components:
            config = component.config
            if isinstance(config, ControlNetConfig | T2IAdapterConfig):
                if isinstance(config, ControlNetConfig) and path.is_file() and "shuffle" in path.stem.lower():
                    config = replace(config, pooled=True)  # as in A1111
                module = build(config)
                assert isinstance(module, ControlNet | ControlNetUnion | T2IAdapter)
                fill(module, member, component, device=place, dtype=kind)
                if "difference" in member.tensors:
                    _add(module, unet, path)
                if fast:
                    tune(module)
                return ControlModel(str(source) if source == "tiny" else path.stem, module.eval())
    raise SourceError(f"{source} is neither a ControlNet nor a T2I-Adapter: see its audit")


@torch.no_grad()
def _add(module: torch.nn.Module, unet: UNet | None, path: Path) -> None:
    """Add the UNet's encoder to a ControlNet that holds what it differs by."""
    if unet is None:
        raise SourceError(f"{path} holds the difference from a model's UNet: use it with one, or pass unet=")
    if is_fp8(unet):
        raise UsageError(f"{path} holds the difference from a UNet, and the model's is in float8: load it without fp8")
    shared = unet.state_dict()
    for name, parameter in module.named_parameters():
        if name in shared:
            if shared[name].shape != parameter.shape:
                raise SourceError(
                    f"{path} holds the difference from another family's UNet: {name} is {tuple(parameter.shape)}, and "
                    f"the model's {tuple(shared[name].shape)}"
                )
            parameter.add_(shared[name].to(parameter))


FEW_STEPS = {"turbo": 4, "lightning": 4, "hyper": 8, "lcm": 4}
"""Distilled models by a word in their names, and how many steps they are made for where the name does not say."""


def settle_scheduler(
    model: Model, unet: UNet, prediction: Prediction | None, name: str
) -> tuple[SchedulerConfig, int | None, dict[str, str]]:
    """The scheduler of a model, its own number of steps, and what was inferred, each with the reason.

    `name` is that of the file with the UNet, or empty where a published folder states its scheduler.
    """
    inferred: dict[str, str] = {}
    scheduler = SchedulerConfig.from_published(model.scheduler)
    if model.family in ("sd1", "sd2") and scheduler.steps_offset != 1:
        # as diffusers' StableDiffusionPipeline: the published models were all sampled from timestep 1 on
        inferred["steps_offset"] = f"1, as all Stable Diffusion models, not {scheduler.steps_offset}"
        scheduler = replace(scheduler, steps_offset=1)
    if prediction is not None:
        scheduler = replace(scheduler, prediction=prediction)
    elif not model.prediction_known and scheduler.prediction == "v":
        found, share = probe_prediction(unet)
        scheduler = replace(scheduler, prediction=found)
        inferred["prediction"] = f"{found}, as the UNet answers pure noise with {share:.0%} of that noise"
    elif not model.prediction_known:
        inferred["prediction"] = f"{scheduler.prediction}, as nothing in the file says otherwise"
    if scheduler.zero_snr and scheduler.prediction == "epsilon":
        inferred["zero_snr"] = "the first step's noise hides the picture, and epsilon says nothing of it there"
        warnings.warn(
            "scheduler_config.json asks for zero terminal SNR of a model that predicts epsilon: at the first step that "
            "says nothing of the picture. Such models predict v: pass prediction= if the file says it wrong",
            NativesdWarning,
            stacklevel=2,
        )
    steps = None
    words = [word for word in FEW_STEPS if word in name.lower()]
    if words:
        stated = re.search(r"(\d+)[-_ ]?steps?", name.lower())
        steps = int(stated[1]) if stated else FEW_STEPS[words[0]]
        distilled = "LCMScheduler" if words[0] == "lcm" else "EulerDiscreteScheduler"
        if words[0] == "turbo":
            distilled = "EulerAncestralDiscreteScheduler"
        scheduler = replace(scheduler, class_name=distilled, spacing="trailing", set_alpha_to_one=True)
        inferred["scheduler"] = f"{distilled} with trailing steps, as the file's name says {words[0]}"
        inferred["steps"] = f"{steps}, as the file's name says {stated[0] if stated else words[0]}"
        if "x0" in name.lower() and prediction is None:
            scheduler = replace(scheduler, prediction="sample")
            inferred["prediction"] = "sample, as the file's name says x0"
    return scheduler, steps, inferred


@torch.inference_mode()
def probe_prediction(unet: UNet) -> tuple[Prediction, float]:
    """What a UNet predicts, epsilon or v, by its answer to noise at the last timestep; and the noise's share in it.

    There the noise is nearly all there is: to predict it is to repeat the input, while the velocity is the clean
    latents, negative, and only 7 % of the noise (alpha is 0.0047).
    """
    config, weight = unet.config, unet.conv_in.weight
    noise = torch.randn(1, config.in_channels, 32, 32, generator=torch.Generator().manual_seed(0)).to(weight)
    context = torch.zeros(1, 77, config.context).to(weight)
    answer = unet(noise, LAST_TIMESTEP, context).float()
    share = float((answer * noise[:, : config.out_channels]).mean() / noise[:, : config.out_channels].square().mean())
    return ("epsilon" if share > 0.5 else "v"), share


def picture_side(model: Model, prediction: Prediction) -> int:
    """Side, in latent cells, of the pictures that the UNet was trained on."""
    config = model.parts["unet"][1].config
    if model.prediction_known or not isinstance(config, UNetConfig):
        return model.size
    return picture_size(model.family, prediction, config)


def taesd(family: str) -> Path:
    """The published TAESD of a family, from the cache or the hub. Raises NetworkError."""
    from nativesd.weights.files.hub import fetch_file

    name = "madebyollin/taesdxl" if family in ("sdxl", "refiner") else "madebyollin/taesd"
    return fetch_file(name, "diffusion_pytorch_model.safetensors")


def locate(source: str | Path, *, half: bool) -> Path:
    """The model's local folder or file."""
    if source == "tiny":
        return TINY
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise SourceError(f"{source} does not exist; a model is 'tiny', a folder, a file, or a hub id such as org/name")
    from nativesd.weights.files.hub import fetch  # the hub's client is not needed for local files

    return fetch(source, half=half)


ENCODERS = {"sdxl": ["text_encoder", "text_encoder_2"], "refiner": ["text_encoder_2"]}
"""The text encoders of the families that do not have just one."""


def identify_known(
    path: Path, members: Sequence[Member], tables: Mapping[str, KeyMap]
) -> list[tuple[Member, Identity]]:
    """`identify_all`, for sources of which no tensor may be left over. Raises WeightsError, naming those that are."""
    identities = identify_all(members, tables)
    for _, identity in identities:
        if identity.unsupported is not None:
            raise WeightsError(f"{path} is {identity.unsupported.says}")
    if unknown := [key for _, identity in identities for key in identity.unrecognised]:
        raise WeightsError(
            f"{path} holds {len(unknown)} tensors that no component of any known layout has:\n  "
            + "\n  ".join(f"unexpected {line}" for line in grouped(unknown))
        )
    return identities


def describe(
    path: Path,
    tables: Mapping[str, KeyMap],
    *,
    unet: str | Path | None = None,
    others: Sequence[str | Path] = (),
    half: bool = False,
) -> Model:
    """Identify a model's components; `unet` and `others` are sources of components that replace its own.

    Raises SourceError for what cannot be read, or where a component is missing.
    """
    members = [] if unet is None else open_source(unet, half=half)
    members += open_source(path, half=half)
    for other in others:
        members += open_source(other, half=half) if other != "taesd" else []
    parts: dict[str, tuple[Member, Component]] = {}
    identities = identify_known(path, members, tables)
    if "taesd" in others:  # which one, the family decides
        family = next((identity.family for _, identity in identities if identity.family), "")
        identities += identify_known(path, open_source(taesd(family)), tables)
    for member, identity in identities:
        for component in identity.components:
            if component.config is not None and not (component.name == "unet" and "unet" in parts):
                parts[component.name] = member, component
    if "unet" not in parts:
        kinds = ", ".join(component.name for _, identity in identities for component in identity.components)
        raise SourceError(f"{path} has no UNet that is recognised (found: {kinds or 'nothing known'}): see its audit")
    config = parts["unet"][1].config
    assert isinstance(config, UNetConfig)
    family, variant = unet_family(config)
    if "tiny_vae" in parts:
        parts["vae"] = parts["tiny_vae"]
    wanted = ["vae", *ENCODERS.get(family, ["text_encoder"])]
    if lacking := [name for name in wanted if name not in parts]:
        raise SourceError(
            f"{path} has no {' and no '.join(lacking)}: pass "
            + " and ".join("vae=" if name == "vae" else "text_encoders=" for name in lacking)
        )
    parts = {name: parts[name] for name in ("unet", *wanted)}
    context = sum(c.width for _, component in parts.values() if isinstance(c := component.config, TextEncoderConfig))
    if context != config.context:
        names = " + ".join(wanted[1:])
        raise SourceError(f"{path}: the UNet takes a context {config.context} wide, but {names} gives {context}")
    if (path / "model_index.json").is_file():
        index = read_json(path / "model_index.json")
        size = read_json(path / "unet" / "config.json").get("sample_size")
        return Model(
            path=path,
            family=family,
            parts=parts,
            scheduler=read_json(path / "scheduler" / "scheduler_config.json"),
            prediction_known=True,
            size=size if isinstance(size, int) else 128 if config.added is not None else 64,
            zero_empty_negative=bool(index.get("force_zeros_for_empty_prompt", family == "sdxl")),
        )
    keys = parts["unet"][0].tensors
    if "edm_mean" in keys:
        raise SourceError(
            f"{path} is an EDM model (it has edm_mean, as Playground 2.5), which cannot be sampled here yet"
        )
    kind, evidence = prediction_of(keys, family, variant)
    if OWN_FORM in variant:
        warnings.warn(
            f"{path} is a UNet of no published form: its head counts are taken by the family's rule, as no header says "
            f"them; load its folder, with config.json, where the pictures are wrong",
            NativesdWarning,
            stacklevel=2,
        )
    turbo = "denoiser.sigmas" in keys and family == "sd2"  # Stability's sgm export of SD-Turbo
    return Model(
        path=path,
        family=family,
        parts=parts,
        scheduler=scheduler_json(family, kind, turbo=turbo, zero_snr="ztsnr" in keys),
        prediction_known=evidence.determined or turbo,
        size=picture_size(family, kind, config),
        zero_empty_negative=family == "sdxl",
    )


def _tokenizer(path: Path, name: str, encoder: TextEncoderConfig) -> ClipTokenizer:
    """The model's own tokenizer files, or the vocabulary in the package with the family's padding."""
    own = path / name.replace("text_encoder", "tokenizer")
    default = pad_token(encoder)
    if (own / "vocab.json").is_file() or (own / "tokenizer.json").is_file():
        return ClipTokenizer(own, pad=pad_id(own, default), length=encoder.length)
    return ClipTokenizer(DEFAULT, pad=default, length=encoder.length)


def find_device(device: str | torch.device | None) -> torch.device:
    """The device, or CUDA where there is one. Raises UsageError where it cannot be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"device {str(device)!r} cannot be used: {reason}") from error
    return place


def _compiles(asked: bool | Literal["auto"], device: torch.device) -> bool:
    triton = find_spec("triton") is not None
    if asked is True and device.type == "cuda" and not triton:
        raise UsageError("compile=True needs Triton on CUDA: pip install triton (on Windows triton-windows)")
    return triton and device.type == "cuda" if asked == "auto" else asked


def _require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        raise UsageError(f"fp8=True is for NVIDIA GPUs (RTX 40, H100 and newer), and the device is {device}")
    if dtype == torch.float32:
        raise UsageError("fp8=True saves memory where the rest is float16 or bfloat16: pass one of them as dtype")
    if reason := why_not_fp8(device):
        raise UsageError(f"fp8=True needs an RTX 40, an H100 or newer, and torch's support: {device} says {reason}")


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise UsageError(f"dtype must be float16, bfloat16 or float32, not {dtype}")
    return found
