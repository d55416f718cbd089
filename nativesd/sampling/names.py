"""The names that people type for samplers and schedules: of A1111, ComfyUI, k-diffusion and the published classes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nativesd.errors import UsageError
from nativesd.sampling.options import PLAIN, Sampling
from nativesd.sampling.published import Kind, SchedulerConfig
from nativesd.sampling.schedule import Schedule, make_schedule
from nativesd.sampling.table import SAMPLERS, SCHEDULES, Sampler


@dataclass(frozen=True)
class Choice:
    """A sampler as somebody named it. `kind` is None where the name says nothing of the schedule."""

    sampler: Sampler
    kind: Kind | None
    by_class: bool
    """Named by its published class, whose noise is never Brownian but for DPMSolverSDEScheduler's."""
    drops_penultimate: bool = False
    """The program that has this name leaves the last sigma but one out."""
    name: str = ""
    """As it was typed."""

    @property
    def shown(self) -> str:
        """The name by which a picture's parameters keep it: the sampler's own, unless that means something else."""
        own = find_sampler(self.sampler.name)

        def meaning(choice: Choice) -> tuple[bool, bool, float, float | None]:
            return choice.drops_penultimate, choice.brownian, choice.scale(1.0), choice.eta(None)

        return self.sampler.name if meaning(own) == meaning(self) else self.name

    def scale(self, guidance_scale: float) -> float:
        """The guidance scale as the sampler takes it: of CFG++ a part of it, but by ComfyUI's names."""
        as_is = not self.sampler.plus_plus or _CFG_PP.search(self.name)
        return guidance_scale if as_is else guidance_scale / PLUS_PLUS

    @property
    def brownian(self) -> bool:
        """Whether the noise is that of one Brownian path."""
        return self.sampler.brownian and (not self.by_class or self.sampler.published == "DPMSolverSDEScheduler")

    def schedule(
        self, config: SchedulerConfig, steps: int, kind: Kind, options: Sampling = PLAIN, *, sdxl: bool = False
    ) -> Schedule:
        """`make_schedule` of `steps` steps as the program that has this name lays them out."""
        if not self.drops_penultimate:
            return make_schedule(config, self.sampler.rule, steps, kind, options, sdxl=sdxl)
        return make_schedule(config, self.sampler.rule, steps + 1, kind, options, sdxl=sdxl).without_penultimate()

    def eta(self, asked: float | None) -> float | None:
        """How much noise is added, as asked for; None: as the sampler has it, which by ComfyUI's names may be none."""
        return 0.0 if asked is None and _CALM.match(self.name) else asked

    def settings(self, config: SchedulerConfig) -> SchedulerConfig:
        """`config` as far as it concerns this sampler: the options of a solver hold for the one that they are of."""
        own = find_own(config)
        if own is not None and own.sampler is self.sampler:
            return config
        plain = SchedulerConfig()
        return replace(
            config, order=plain.order, solver=plain.solver, lower_order_final=plain.lower_order_final,
            euler_at_final=plain.euler_at_final,
        )  # fmt: skip


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower()).replace("++", "pp")


def _names(sampler: Sampler) -> tuple[str, ...]:
    return (sampler.name, *filter(None, [sampler.published]), *sampler.aliases)


_SAMPLERS = {_key(name): sampler for sampler in SAMPLERS for name in _names(sampler)}
_SCHEDULES = {_key(name): schedule.name for schedule in SCHEDULES for name in (schedule.name, *schedule.aliases)}
_COMFYUI_DIFFERS = re.compile(r"(dpmpp_3m_sde|uni_pc)(_|$)")
"""Names of samplers that leave the last sigma but one out in A1111 and not in ComfyUI, or the other way round: see
DISCARD_PENULTIMATE_SIGMA_SAMPLERS of ComfyUI's comfy/samplers.py."""
_CALM = re.compile("dpm_(fast|adaptive)$")
"""ComfyUI's names of samplers that are ancestral in A1111, and not there."""
_CFG_PP = re.compile("_cfg_pp")
"""ComfyUI's names of CFG++ samplers, whose guidance scale is the paper's."""
PLUS_PLUS = 12.5
"""A1111's divisor of the scale in CFG++ (`cond_scale_miltiplier` of modules/sd_samplers_timesteps_impl.py)."""
_ABOUT_THE_NAME = re.compile(r"^(k|sample)_|_gpu$")
"""What k-diffusion's functions, the programs that call them so, and ComfyUI's samplers with the card's noise add."""


def find_sampler(name: str, schedule: str | None = None) -> Choice:
    """The sampler of a name, in any case, and its schedule: fused ("DPM++ 2M Karras") or split. Raises UsageError."""
    kind = None if schedule is None else find_schedule(schedule)
    bare = _ABOUT_THE_NAME.sub("", name.strip())
    key = _key(bare)
    if key not in _SAMPLERS:
        for suffix, fused in _SCHEDULES.items():
            if key.endswith(suffix) and key.removesuffix(suffix) in _SAMPLERS:
                if kind not in (None, fused):
                    raise UsageError(f"sampler {name!r} and schedule {schedule!r} contradict each other")
                key, kind = key.removesuffix(suffix), fused
                break
        else:
            raise UsageError(f"there is no sampler {name!r}: choose one of {', '.join(each.name for each in SAMPLERS)}")
    sampler = _SAMPLERS[key]
    by_class = sampler.published is not None and key == _key(sampler.published)
    drops = sampler.drops != bool(_COMFYUI_DIFFERS.match(bare))
    return Choice(sampler, kind, by_class, drops_penultimate=drops and not by_class, name=name)


def find_own(config: SchedulerConfig) -> Choice | None:
    """The sampler of a published config; None where it has no equal here."""
    try:
        return find_sampler(config.class_name)
    except UsageError:
        return None


def find_schedule(name: str) -> Kind:
    """The schedule of a name, in any case. Raises UsageError."""
    if _key(name) not in _SCHEDULES:
        raise UsageError(f"there is no schedule {name!r}: choose one of {', '.join(each.name for each in SCHEDULES)}")
    return _SCHEDULES[_key(name)]
