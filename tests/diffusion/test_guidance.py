"""Guidance records against diffusers' pipelines and guiders, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders import adaptive_projected_guidance, tangential_classifier_free_guidance
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceHook
from test_pipeline import save_model
from torch import Tensor

import nativesd
from nativesd import APG, PAG, SEG, SLG, TCFG, DynamicThreshold, FreeU, Hires, Interval, Sampling
from nativesd.config import Level, UNetConfig
from nativesd.diffusion.conditioning import Conditioning
from nativesd.diffusion.guiding.combine import At, Guidance
from nativesd.diffusion.guiding.guiders import GUIDERS, Combined, Guider, Perturbed
from nativesd.errors import UsageError
from nativesd.pictures.programs.guided import guidance_of
from nativesd.pipeline.asked.worded import read_guidance, record_text
from oracles import run_published_unet, unet_inputs, unet_pair

SIGMA = 3.0
OPTIONS: dict[str, Any] = {"steps": 5, "seed": 5, "sampler": "Euler", "width": 64, "height": 48}
EPSILON = At(torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(9)) * SIGMA, SIGMA, 1.0, -SIGMA)
CLEAN = At(EPSILON.x, SIGMA, 0.0, 1.0)
"""Of a model that predicts the noise, and of one that predicts the clean latents."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("guidance")
    for form in ("sd15", "sdxl"):
        save_model(form, root / form)
    return {path.name: path for path in root.iterdir()}


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def published(form: str, folder: Path, pag: bool, layers: list[str]) -> Any:
    name = {"sd15": "StableDiffusion{}Pipeline", "sdxl": "StableDiffusionXL{}Pipeline"}[form].format("PAG" * pag)
    options: dict[str, Any] = {"pag_applied_layers": layers} if pag else {}
    if form == "sd15":
        options |= {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    pipe = getattr(diffusers, name).from_pretrained(folder, **options)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, scale: float, **options: Any) -> Tensor:
    out: Tensor = pipe(
        "a fox", negative_prompt="fog", num_inference_steps=5, width=64, height=48, guidance_scale=scale,
        generator=torch.Generator().manual_seed(5), output_type="latent", **options,
    ).images  # fmt: skip
    return out


@pytest.mark.parametrize("scale", [6.0, 1.0])
@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_pag_is_diffusers(folders: dict[str, Path], form: str, scale: float) -> None:
    ours = nativesd.load(folders[form], device="cpu")
    plain = ours("a fox", negative_prompt="fog" if scale > 1 else "", guidance_scale=scale, **OPTIONS).latents
    for layers, names in ((("mid",), ["mid"]), (("up.1",), ["up_blocks.0"])):
        expected = theirs(published(form, folders[form], True, names), scale, pag_scale=3.0)
        found = ours(
            "a fox", negative_prompt="fog" if scale > 1 else "", guidance_scale=scale,
            guidance=PAG(3.0, layers), **OPTIONS,
        ).latents  # fmt: skip
        assert close(found, expected), layers
        assert not close(found, plain)


@pytest.mark.parametrize("form", ["sd15", "sdxl"])
def test_freeu_is_diffusers(folders: dict[str, Path], form: str) -> None:
    pipe = published(form, folders[form], False, [])
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    ours = nativesd.load(folders[form], device="cpu")
    options = OPTIONS | {"negative_prompt": "fog", "guidance_scale": 6.0}
    found = ours("a fox", guidance=FreeU(), **options).latents
    assert close(found, theirs(pipe, 6.0))
    plain = ours("a fox", **options).latents
    assert not close(found, plain)
    assert close(ours("a fox", guidance=FreeU(1, 1, 1, 1), **options).latents, plain)


CONFIG = UNetConfig(
    levels=(Level(32, (1, 1), (1, 1, 1), 2), Level(64, (2, 2), (2, 2, 2), 4)), mid=(2, None), context=48
)


def one_side(guider: Perturbed, config: UNetConfig, seed: int = 0) -> tuple[Tensor, Any, Any]:
    ours, reference = unet_pair(config, seed)
    inputs = unet_inputs(config, 2, 16, 16, timestep=500)
    with torch.inference_mode():
        found: Tensor = ours(inputs.latents, inputs.timestep, inputs.context, edits=(guider.perturbation(),))
    return found, reference, inputs


@pytest.mark.parametrize("blur", [1.5, 9999.0])
def test_seg_is_diffusers_hook(blur: float) -> None:
    """Its branches of the Gaussian and of the mean are exchanged there: the threshold says which one runs."""
    found, reference, inputs = one_side(SEG(layers=("mid",), blur=blur), CONFIG)
    plain = run_published_unet(reference, inputs)
    for block in reference.mid_block.attentions[0].transformer_blocks:
        hook = SmoothedEnergyGuidanceHook(1.5, 0.0) if blur < 9999 else SmoothedEnergyGuidanceHook(1.0)
        HookRegistry.check_if_exists_or_initialize(block.attn1.to_q).register_hook(hook, "seg")
    expected = run_published_unet(reference, inputs)
    assert close(found, expected)
    assert not close(found, plain)


def test_slg_is_diffusers_hook() -> None:
    found, reference, inputs = one_side(SLG(layers=("mid",)), CONFIG)
    plain = run_published_unet(reference, inputs)
    config = LayerSkipConfig(indices=[0, 1], fqn="mid_block.attentions.0.transformer_blocks")
    apply_layer_skip(reference, config)
    assert close(found, run_published_unet(reference, inputs))
    assert not close(found, plain)


def drawn(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 4, 6, 5, generator=generator) for _ in range(count)]


def sides() -> list[Conditioning]:
    states = torch.zeros(2, 77, 8)
    return [Conditioning(states, torch.zeros(2), role="negative"), Conditioning(states, torch.ones(2))]


@pytest.mark.parametrize("at", [EPSILON, CLEAN], ids=["epsilon", "sample"])
@pytest.mark.parametrize("guider", [APG(), APG(0.5, 2.0, 0.0), APG(1.0, 0.0, -0.75)])
def test_apg_is_diffusers(guider: APG, at: At) -> None:
    """Between clean latents, as the paper has it, and over steps that have momentum."""
    buffer = adaptive_projected_guidance.MomentumBuffer(guider.momentum)
    combiner = guider.begin()
    for negative, positive in zip(drawn(6)[::2], drawn(6)[1::2], strict=True):
        found = at.clean(Guidance(7.5).combine([negative, positive], sides(), at, [combiner]))
        expected = adaptive_projected_guidance.normalized_guidance(
            at.clean(positive), at.clean(negative), 6.5, buffer, guider.eta, guider.threshold,
            use_original_formulation=True,
        )  # fmt: skip
        assert close(found, expected)
    assert guider.eta == 1 or not close(found, at.clean(Guidance(7.5).combine([negative, positive], sides(), at)))


def test_apg_that_keeps_all_is_plain() -> None:
    negative, positive = drawn(2)
    found = Guidance(7.5).combine([negative, positive], sides(), EPSILON, [APG(1.0, 0.0, 0.0).begin()])
    assert close(found, negative + 7.5 * (positive - negative))


def test_tcfg_is_diffusers() -> None:
    negative, positive = drawn(2)
    found = Guidance(7.5).combine([negative, positive], sides(), EPSILON, [TCFG().begin()])
    expected = tangential_classifier_free_guidance.normalized_guidance(positive, negative, 7.5)
    assert close(found, expected)
    assert not close(found, Guidance(7.5).combine([negative, positive], sides(), EPSILON))
    noises = [EPSILON.noise(output) for output in (negative, positive)]
    other = At(EPSILON.x, SIGMA, 0.3, -0.8)  # the same noises, said by another kind of model
    again = Guidance(7.5).combine([other.of_noise(noise) for noise in noises], sides(), other, [TCFG().begin()])
    assert close(other.noise(again), expected)


@pytest.mark.parametrize("at", [EPSILON, CLEAN], ids=["epsilon", "sample"])
@pytest.mark.parametrize(("mimic", "percentile", "phi"), [(4.0, 1.0, 1.0), (7.0, 0.95, 0.7), (12.0, 1.0, 1.0)])
def test_dynamic_thresholding(mimic: float, percentile: float, phi: float, at: At) -> None:
    """As dynthres_core.py states it, written for numpy: the guided values in the range that the lower scale has."""
    negative, positive = drawn(2)
    combiner = DynamicThreshold(mimic, percentile, phi).begin()
    found = at.clean(Guidance(12.0).combine([negative, positive], sides(), at, [combiner]))
    without, wanted = (at.clean(output).double().numpy() for output in (negative, positive))
    for picture in range(2):
        for channel in range(4):
            base = without[picture, channel]
            high, low = (base + scale * (wanted[picture, channel] - base) for scale in (12.0, mimic))
            spread = np.abs(low - low.mean()).max()
            limit = max(spread, np.quantile(np.abs(high - high.mean()), percentile))
            expected = np.clip(high - high.mean(), -limit, limit) / limit * spread + high.mean()
            expected = phi * expected + (1 - phi) * high
            assert np.abs(found[picture, channel].numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_an_interval_leaves_the_negative_prompt_out(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = nativesd.load(folders["sd15"], device="cpu")
    rows: list[int] = []
    forward = pipe.unet.forward

    def record(latents: Tensor, time: float, context: Any, **options: Any) -> Tensor:
        rows.append(context.shape[0])
        return forward(latents, time, context, **options)

    monkeypatch.setattr(pipe.unet, "forward", record)
    states: list[Tensor] = []
    options = OPTIONS | {"steps": 10, "guidance_scale": 6.0, "on_step": lambda step: states.append(step.latents)}
    pipe("a fox", guidance=Interval(0.2, 0.6), **options)
    assert rows == [1, 1, 2, 2, 2, 2, 1, 1, 1, 1]
    unguided, limited = [], states.copy()
    pipe("a fox", **(options | {"guidance_scale": 1.0, "on_step": lambda step: unguided.append(step.latents)}))
    assert close(limited[2], unguided[2])
    assert not close(limited[3], unguided[3])
    rows.clear()
    pipe("a fox AND an owl", guidance="interval:end=0.5", **options)
    assert rows == [3] * 10


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM2"])
@pytest.mark.parametrize("churn", [0.0, 0.5, 8.0])
def test_churn_moves_no_step(sampler: str, churn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance sets in with the step it is for, though churn has raised the noise that the step begins at."""
    pipe = nativesd.load("tiny", device="cpu")
    rows, said = list[int](), list[int]()
    forward = pipe.unet.forward

    def record(latents: Tensor, time: float, context: Any, **options: Any) -> Tensor:
        rows.append(context.shape[0])
        return forward(latents, time, context, **options)

    monkeypatch.setattr(pipe.unet, "forward", record)
    pipe("a fox", guidance=Interval(0.5, 1.0), guidance_scale=4.0, steps=6, seed=1, sampler=sampler, width=64,
         height=64, sampling=Sampling(churn=churn), on_step=lambda step: said.append(len(rows)))  # fmt: skip
    # of every step the rows of the call that begins it; a call that a later step shares belongs to it
    assert [rows[count - 1] for count in said] == [1, 1, 1, 2, 2, 2]


def test_records_go_together(folders: dict[str, Path]) -> None:
    """In any number and order, for pictures of a batch as for each alone, and one by one as together."""
    pipe = nativesd.load(folders["sd15"], device="cpu")
    every: list[Guider | str] = [PAG(2, ("mid", "down.0.1")), "slg:layers=up.0,end=1", SEG(1.0, blur=2.0), APG(),
                                 TCFG(), "threshold:5", FreeU(), Interval(0.0, 0.8)]  # fmt: skip
    options = OPTIONS | {"guidance_scale": 6.0, "guidance": every, "negative_prompt": "fog"}
    prompts = ["a fox", "an owl BREAK at night", "a fox AND a penguin"]
    together = pipe(prompts, **options)
    assert not close(together.latents, pipe(prompts, **(options | {"guidance": None})).latents)
    for i, prompt in enumerate(prompts[:2]):
        assert close(together.latents[i : i + 1], pipe(prompt, **(options | {"seed": 5 + i})).latents)
    pipe.sequential = True
    assert close(pipe(prompts, **options).latents, together.latents)


def test_nothing_more_is_asked_without_records(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = nativesd.load(folders["sd15"], device="cpu")
    told: list[tuple[int, Any]] = []
    forward = pipe.unet.forward

    def record(latents: Tensor, time: float, context: Any, **options: Any) -> Tensor:
        told.append((latents.shape[0], options["edits"]))
        return forward(latents, time, context, **options)

    monkeypatch.setattr(pipe.unet, "forward", record)
    pipe("a fox", guidance_scale=6.0, **OPTIONS)
    assert told == [(1, ())] * 5
    plain = pipe("a fox", guidance_scale=6.0, **OPTIONS).latents
    assert close(pipe("a fox", guidance_scale=6.0, guidance=PAG(0), **OPTIONS).latents, plain)


@pytest.mark.parametrize("kind", GUIDERS.values())
def test_a_record_is_its_text(kind: type[Guider]) -> None:
    record = kind()
    assert read_guidance("guidance", record_text(record)) == (record,)
    assert isinstance(record, Perturbed | Combined | Interval | FreeU)


def test_texts_of_records(folders: dict[str, Path], tmp_path: Path) -> None:
    assert read_guidance("guidance", "pag:3") == (PAG(3.0),)
    many = "pag:2.5,layers=mid+up.1 seg:blur=2 apg:eta=0.5 interval:start=0.1,end=0.9"
    assert " ".join(map(record_text, read_guidance("guidance", many))) == (
        "pag:scale=2.5,layers=mid+up.1 seg:blur=2.0 apg:eta=0.5 interval:start=0.1,end=0.9"
    )
    pipe = nativesd.load(folders["sd15"], device="cpu")
    first = pipe("a fox", guidance=many, guidance_scale=6.0, **OPTIONS)
    options, unheeded = nativesd.options_from(first.save(tmp_path / "fox.png")[0])
    assert not [each for each in unheeded if "uidance" in each]
    assert options["guidance"] == first.parameters["guidance"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (7.5, "a number is guidance_scale"), ("pug:3", "there is no 'pug': there are pag"),
        ("pag:scale=much", "pag's scale must be a number"), ("pag:size=3", "it has scale, layers, start, end"),
        ("tcfg:1", "nothing to say"), (PAG(start=2), "between 0 and 1"), (PAG(layers=()), "names of layers"),
        ("pag:3,scale=4", "pag has scale twice: keep one"), ("freeu:b1=1.1,b2=1.2,b1=1.3", "freeu has b1 twice"),
        ("pag:layers=middle", "no transformer at middle: it has mid, mid.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(folders: dict[str, Path], value: Any, said: str) -> None:
    pipe = nativesd.load(folders["sd15"], device="cpu")
    with pytest.raises(UsageError, match=said):
        pipe("a fox", guidance=value, **OPTIONS)


@pytest.mark.parametrize("layers", [5, None, []])
def test_layers_that_are_no_names(layers: Any) -> None:
    with pytest.raises(UsageError, match="must be names of layers"):
        read_guidance("guidance", PAG(layers=layers))


def test_an_end_before_the_start() -> None:
    with pytest.raises(UsageError, match=r"0\.8 is after 0\.2"):
        read_guidance("guidance", PAG(start=0.8, end=0.2))


NO_NOISE, NAMES = "sampling.noise is not used: Euler adds no noise", "sampling.{} is not used"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampling": Sampling(sigma_max=5)}, [NAMES.format("sigma_max")]),
        ({"sampling": Sampling(sigma_max=5, sigma_min=1), "schedule": "linear quadratic"}, [NAMES.format("sigma_min")]),
        ({"sampling": Sampling(sigma_max=5, sigma_min=0.1, rho=3), "schedule": "karras"}, []),
        ({"sampling": Sampling(rho=3, noise=0.5)}, [NO_NOISE, NAMES.format("rho")]),
        ({"sampling": Sampling(noise=0.5, churn=1)}, []),
        ({"sampling": Sampling(noise=0.5), "sampler": "Euler a"}, []),
        ({"guidance": "slg", "steps": 4}, ["guidance slg is not used"]), ({"guidance": SLG(start=0), "steps": 4}, []),
        ({"hires": Hires(1.25, prompt="a fox <lora:nope:1>")}, ["<lora:nope> in hires.prompt is not used"]),
        ({"sampler": "DPM adaptive", "num_images": 2, "sampling": Sampling(sigma_max=5), "schedule": "karras"},
         ["DPM adaptive takes the same steps"]),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_said(folders: dict[str, Path], options: dict[str, Any], said: list[str]) -> None:
    pipe = nativesd.load(folders["sd15"], device="cpu")
    options = {"steps": 2, "seed": 1, "sampler": "Euler", "width": 64, "height": 64} | options
    notes = pipe("a fox", **options).parameters["notes"]
    assert len(notes) == len(said)
    assert all(note.startswith(start) for note, start in zip(notes, said, strict=True))


def test_rho_that_no_number_can_hold_is_refused(folders: dict[str, Path]) -> None:
    pipe = nativesd.load(folders["sd15"], device="cpu")
    with pytest.raises(UsageError, match=r"sampling\.rho"):
        pipe("a fox", schedule="karras", sampling=Sampling(rho=0.001), **OPTIONS)


@pytest.mark.parametrize("steps", [7, 12, 20, 30, 999])
def test_skipped_guidance_begins_with_its_step(steps: int) -> None:
    """A1111 skips the steps up to a share of all; the text keeps every digit, so that the next one is not missed."""
    for early in (0.1, 0.25, 1 / 3, 0.8):
        text, _ = guidance_of({"skip early cfg": repr(early)}, steps)
        (interval,) = read_guidance("guidance", text)
        first = next(step for step in range(steps) if interval.acts(step, steps))
        assert first == int(early * steps) + 1
