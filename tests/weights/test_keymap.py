"""The weight maps: every published name to a parameter of ours and back, and every way in which a table is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clock import seconds_of
from nativesd.config import (
    BK_SDM_BASE,
    BK_SDM_TINY,
    BK_SDM_V2_BASE,
    BK_SDM_V2_TINY,
    CLIP_L,
    OPENCLIP_H,
    REFINER_UNET,
    SD15_UNET,
    SD21_UNET,
    SD_VAE,
    SDXL_BIGG,
    SDXL_CLIP_L,
    SDXL_UNET,
    SDXL_VAE,
    SSD_1B_UNET,
    Config,
    UNetConfig,
    VAEConfig,
)
from nativesd.models.build import expected
from nativesd.weights.maps.keymap import BoundMap, KeyMap, load_table, load_tables
from nativesd.weights.maps.plan import Plan, make_plan
from nativesd.weights.maps.rules import Shape
from nativesd.weights.maps.templates import TableError, evaluate, expression
from oracles import published_manifests, text_kwargs, unet_kwargs, vae_kwargs

MANIFESTS = published_manifests()


CONFIGS: dict[str, Config] = {
    "sd15.unet.diffusers": SD15_UNET,
    "sd15-inpainting.unet.diffusers": replace(SD15_UNET, in_channels=9),
    "lcm-dreamshaper-v7.unet.diffusers": replace(SD15_UNET, guidance=256),
    "sd21.unet.diffusers": SD21_UNET,
    "sd21-base.unet.diffusers": SD21_UNET,
    "sd-turbo.unet.diffusers": SD21_UNET,
    "sd2-inpainting.unet.diffusers": replace(SD21_UNET, in_channels=9),
    "sdxl-base.unet.diffusers": SDXL_UNET,
    "sdxl-refiner.unet.diffusers": REFINER_UNET,
    "ssd-1b.unet.diffusers": SSD_1B_UNET,
    "bk-sdm-base.unet.diffusers": BK_SDM_BASE,
    "bk-sdm-v2-base.unet.diffusers": BK_SDM_V2_BASE,
    "bk-sdm-tiny.unet.diffusers": BK_SDM_TINY,
    "bk-sdm-v2-tiny.unet.diffusers": BK_SDM_V2_TINY,
    "segmind-small-sd.unet.diffusers": BK_SDM_BASE,
    "sd15.vae.diffusers": SD_VAE,
    "sd15.vae.diffusers-deprecated-attn": SD_VAE,
    "sd21.vae.diffusers": SD_VAE,
    "sd21.vae.diffusers-deprecated-attn": SD_VAE,
    "sdxl.vae.diffusers": SDXL_VAE,
    "sd15.text_encoder.transformers": CLIP_L,
    "sd15.text_encoder.transformers5": CLIP_L,
    "sd15.text_encoder.transformers-position_ids": CLIP_L,
    "sd21.text_encoder.transformers": OPENCLIP_H,
    "sd21.text_encoder.transformers-position_ids": OPENCLIP_H,
    "sdxl.text_encoder.transformers": SDXL_CLIP_L,
    "sdxl.text_encoder.transformers-position_ids": SDXL_CLIP_L,
    "sdxl.text_encoder_2.transformers": SDXL_BIGG,
    "sdxl-refiner.text_encoder_2.transformers": SDXL_BIGG,
}
"""manifest -> the config of ours that it has to fill"""

OTHER_SPELLINGS = {stem for stem in CONFIGS if stem.endswith(("-deprecated-attn", "transformers5"))}
"""manifests with names that are read and never written"""

COUNTS = [
    (SD15_UNET, 686),
    (SD21_UNET, 686),
    (SDXL_UNET, 1680),
    (REFINER_UNET, 1220),
    (SD_VAE, 248),
    (SDXL_VAE, 248),
    (CLIP_L, 196),
    (SDXL_CLIP_L, 196),
    (OPENCLIP_H, 372),
    (SDXL_BIGG, 517),
]


@cache
def bound(table: str) -> BoundMap:
    """A shipped table, ready for use."""
    return load_table(table).bind()


def complete(plan: Plan) -> bool:
    """Whether every parameter is filled and every key accounted for."""
    return not (plan.missing or plan.unexpected or plan.wrong_shape or plan.duplicate)


@pytest.mark.parametrize(("config", "count"), COUNTS, ids=[str(count) for _, count in COUNTS])
def test_tensor_counts_of_the_presets(config: Config, count: int) -> None:
    assert len(expected(config)) == count


@pytest.mark.parametrize("stem", CONFIGS)
def test_published_files_fill_our_parameters(stem: str) -> None:
    manifest, ours = MANIFESTS[stem], expected(CONFIGS[stem])
    bound_map = bound(manifest.table)
    plan = make_plan(bound_map, manifest.shapes, ours)
    assert complete(plan)
    assert set(plan.sources) == set(ours)
    used = [key for source in plan.sources.values() for key in source.keys]
    assert sorted([*used, *plan.ignored]) == sorted(manifest.shapes)
    assert [key.endswith("embeddings.position_ids") for key in plan.ignored] == [True] * stem.endswith("position_ids")
    for name, source in plan.sources.items():
        assert [found for key in source.keys for found, _ in bound_map.parameters(key)] == [name]
        written = bound_map.source(name)
        assert written is not None
        assert stem in OTHER_SPELLINGS or written.keys == source.keys


@pytest.mark.parametrize(
    ("old", "current"),
    [
        ("sd15.vae.diffusers-deprecated-attn", "sd15.vae.diffusers"),
        ("sd21.vae.diffusers-deprecated-attn", "sd21.vae.diffusers"),
        ("sd15.text_encoder.transformers5", "sd15.text_encoder.transformers"),
    ],
)
def test_other_spellings_are_written_as_the_current_one(old: str, current: str) -> None:
    assert MANIFESTS[old].shapes.keys() != MANIFESTS[current].shapes.keys()
    bound_map = bound(MANIFESTS[old].table)
    sources = [bound_map.source(name) for key in MANIFESTS[old].shapes for name, _ in bound_map.parameters(key)]
    assert {key for source in sources if source for key in source.keys} == set(MANIFESTS[current].shapes)


def test_both_spellings_in_one_file_are_a_duplicate() -> None:
    old, current = (MANIFESTS[f"sd15.vae.diffusers{end}"].shapes for end in ("-deprecated-attn", ""))
    plan = make_plan(bound("vae.diffusers"), {**old, **current}, expected(SD_VAE))
    assert len(plan.duplicate) == 16  # two attentions, four layers, weight and bias
    assert set(plan.duplicate["encoder.mid.attention.to_out.bias"]) == {
        "encoder.mid_block.attentions.0.proj_attn.bias",
        "encoder.mid_block.attentions.0.to_out.0.bias",
    }


PER_LEVEL = ("attention_head_dim", "layers_per_block")
DIFFUSERS_DEFAULTS = {"mid_block_type": "UNetMidBlock2DCrossAttn", "use_linear_projection": False}


@pytest.mark.parametrize("stem", [stem for stem, config in CONFIGS.items() if isinstance(config, UNetConfig)])
def test_unet_presets_state_the_published_configs(stem: str) -> None:
    """What names and shapes do not tell, such as the number of heads; depths are compared by them."""
    config, published = CONFIGS[stem], MANIFESTS[stem].config
    assert isinstance(config, UNetConfig)
    for name, value in unet_kwargs(config).items():
        expected = published.get(name, DIFFUSERS_DEFAULTS.get(name))
        if name in PER_LEVEL:
            value, expected = (v if isinstance(v, list) else [v] * len(config.levels) for v in (value, expected))
        if not name.endswith("transformer_layers_per_block"):
            assert value == expected, name


DEFAULTS = {"scaling_factor": 0.18215, "force_upcast": False}
"""Where a published config is silent; SD1 and SD2 never act on force_upcast, whose class default is True."""


@pytest.mark.parametrize("stem", [stem for stem, config in CONFIGS.items() if not isinstance(config, UNetConfig)])
def test_other_presets_state_the_published_configs(stem: str) -> None:
    config, published = CONFIGS[stem], MANIFESTS[stem].config
    assert not isinstance(config, UNetConfig)
    kwargs = vae_kwargs(config) if isinstance(config, VAEConfig) else text_kwargs(config)
    for name, value in kwargs.items():
        assert value == published.get(name, DEFAULTS.get(name)), name


# --- properties


@pytest.mark.parametrize("stem", ["sd15.unet.diffusers", "sd15.vae.diffusers", "sdxl.text_encoder_2.transformers"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_mapping_and_back_is_the_identity(stem: str, data: st.DataObject) -> None:
    bound_map = bound(MANIFESTS[stem].table)
    keys = data.draw(st.sets(st.sampled_from(sorted(MANIFESTS[stem].shapes))))
    names = {name for key in keys for name, _ in bound_map.parameters(key)}
    assert len(names) == len(keys)
    sources = [bound_map.source(name) for name in names]
    assert {key for source in sources if source for key in source.keys} == keys


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_part_of_a_file_lacks_exactly_the_rest(data: st.DataObject) -> None:
    theirs, ours = MANIFESTS["sd15.text_encoder.transformers"].shapes, expected(CLIP_L)
    dropped = data.draw(st.sets(st.sampled_from(sorted(theirs))))
    plan = make_plan(bound("text_encoder.transformers"), {k: v for k, v in theirs.items() if k not in dropped}, ours)
    assert len(plan.sources) == len(theirs) - len(dropped)
    assert {key for keys in plan.missing.values() for key in keys} == dropped
    assert not plan.unexpected
    assert not plan.wrong_shape
    assert not plan.duplicate


NUMBERS = {"i": 3, "j": 0, "levels": 4}
EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str) | st.sampled_from(sorted(NUMBERS)),
    lambda inner: st.builds(
        lambda left, op, right, grouped: f"({left}{op}{right})" if grouped else f"{left} {op} {right}",
        inner,
        st.sampled_from(["+", "-", "*", "//", "%"]),
        inner,
        st.booleans(),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_expressions_are_pythons_integer_arithmetic(expression: str) -> None:
    try:
        expected = eval(expression, {"__builtins__": {}}, dict(NUMBERS))
    except ZeroDivisionError:
        assume(False)
    assert evaluate(expression, NUMBERS) == expected


FORBIDDEN = [
    "__import__('os')",
    "i.real",
    "i[0]",
    "i**2",
    "i/2",
    "1.5",
    "'1'",
    "(lambda: 0)()",
    "[i for i in (1,)]",
    "i if i else 0",
    "i < 2",
    "i and 1",
    "(i := 1)",
    "f'{i}'",
]


@pytest.mark.parametrize("expression", FORBIDDEN)
def test_expressions_are_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError, match=r"not an integer expression|is not there"):
        evaluate(expression, NUMBERS)


def test_an_expression_needs_its_names() -> None:
    with pytest.raises(KeyError):
        evaluate("i + k", NUMBERS)


# --- the engine, on small tables

HEAD = """
[map]
component = "thing"
layout = "test"
"""


def table(rules: str, dims: Mapping[str, int] | None = None, head: str = HEAD) -> BoundMap:
    """A table of `rules`."""
    return KeyMap.parse(head + rules, "test.toml").bind(dims)


def names(bound_map: BoundMap, key: str) -> list[str]:
    """Our names for a key."""
    return [name for name, _ in bound_map.parameters(key)]


def keys(bound_map: BoundMap, name: str) -> tuple[str, ...] | None:
    """Their names for a parameter."""
    source = bound_map.source(name)
    return None if source is None else source.keys


LOOPS = """
[leaf.resnet]
"in_layers.0" = "norm1"
"skip_connection" = "shortcut"

[[rule]]
theirs = "input_blocks.{1+3*i+j}.0"
ours = "down.{i}.resnets.{j}"
for = { i = "levels", j = "layers" }
leaf = "resnet"

[[rule]]
theirs = "output_blocks.{3*(levels-1-i)+2}.{n}.conv.{p}"
ours = "up.{i}.upsample.{n}.{p}"
for = { i = "levels - 1" }
"""


def test_loops_and_expressions() -> None:
    bound_map = table(LOOPS, {"levels": 3, "layers": 2})
    pairs = {
        "input_blocks.1.0.in_layers.0.weight": "down.0.resnets.0.norm1.weight",
        "input_blocks.5.0.skip_connection.bias": "down.1.resnets.1.shortcut.bias",
        "input_blocks.8.0.in_layers.0.bias": "down.2.resnets.1.norm1.bias",
        "output_blocks.8.12.conv.weight": "up.0.upsample.12.weight",
        "output_blocks.5.0.conv.bias": "up.1.upsample.0.bias",
    }
    for key, name in pairs.items():
        assert names(bound_map, key) == [name]
        assert keys(bound_map, name) == (key,)


@pytest.mark.parametrize(
    "key",
    [
        "input_blocks.3.0.in_layers.0.weight",  # between the levels
        "input_blocks.10.0.in_layers.0.weight",  # past the last level
        "input_blocks.01.0.in_layers.0.weight",
        "input_blocks.1.0.in_layers.0.running_mean",  # {p} is a weight or a bias
        "input_blocks.1.0.in_layers.0",
        "input_blocks.1.0.in_layers.0.weight.0",
        "output_blocks.8.x.conv.weight",  # {n} is a number
        "output_blocks.2.0.conv.weight",  # levels - 1 excludes it
        "",
    ],
)
def test_a_key_that_no_rule_names(key: str) -> None:
    assert names(table(LOOPS, {"levels": 3, "layers": 2}), key) == []


def test_a_parameter_that_no_rule_produces() -> None:
    assert table(LOOPS, {"levels": 3, "layers": 2}).source("down.3.resnets.0.norm1.weight") is None


SPLIT = """
[[rule]]
theirs = "blocks.{n}.attn.in_proj_{p}"
ours = ["layers.{n}.q.{p}", "layers.{n}.k.{p}", "layers.{n}.v.{p}"]
"""


def test_split() -> None:
    bound_map = table(SPLIT)
    theirs = {"blocks.4.attn.in_proj_weight": (12, 5), "blocks.4.attn.in_proj_bias": (12,)}
    ours = {f"layers.4.{part}.{p}": shape for part in "qkv" for p, shape in (("weight", (4, 5)), ("bias", (4,)))}
    plan = make_plan(bound_map, theirs, ours)
    assert complete(plan)
    for index, part in enumerate("qkv"):
        for source in (plan.sources[f"layers.4.{part}.weight"], bound_map.source(f"layers.4.{part}.weight")):
            assert source is not None
            assert source.rule.op == "split"
            assert (source.keys, source.part, source.parts) == (("blocks.4.attn.in_proj_weight",), index, 3)
            assert source.shape(theirs) == (4, 5)


def test_a_split_into_unequal_parts_is_a_wrong_shape() -> None:
    ours = {f"layers.0.{part}.bias": (4,) for part in "qkv"}
    for wrong in ((13,), (), (15,)):
        plan = make_plan(table(SPLIT), {"blocks.0.attn.in_proj_bias": wrong}, ours)
        assert set(plan.wrong_shape) == set(ours)


def test_a_split_of_which_the_model_lacks_a_part_is_unexpected() -> None:
    plan = make_plan(
        table(SPLIT), {"blocks.0.attn.in_proj_bias": (12,)}, {"layers.0.q.bias": (4,), "layers.0.k.bias": (4,)}
    )
    assert set(plan.unexpected) == {"blocks.0.attn.in_proj_bias"}
    assert set(plan.missing) == {"layers.0.q.bias", "layers.0.k.bias"}


CONCAT = """
[[rule]]
theirs = ["attn.to_q.{p}", "attn.to_k.{p}", "attn.to_v.{p}"]
ours = "attn.qkv.{p}"
"""


def test_concat() -> None:
    bound_map = table(CONCAT)
    theirs = {"attn.to_v.weight": (2, 5), "attn.to_q.weight": (4, 5), "attn.to_k.weight": (4, 5)}
    plan = make_plan(bound_map, theirs, {"attn.qkv.weight": (10, 5)})
    assert complete(plan)
    source = plan.sources["attn.qkv.weight"]
    assert source.rule.op == "concat"
    assert source.keys == ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight")
    assert source.keys == keys(bound_map, "attn.qkv.weight")
    assert source.shape(theirs) == (10, 5)


@pytest.mark.parametrize("absent", ["attn.to_q.bias", "attn.to_k.bias", "attn.to_v.bias"])
def test_an_incomplete_concat_is_missing(absent: str) -> None:
    theirs = {f"attn.to_{part}.bias": (4,) for part in "qkv"}
    del theirs[absent]
    plan = make_plan(table(CONCAT), theirs, {"attn.qkv.bias": (12,)})
    assert plan.missing == {"attn.qkv.bias": (absent,)}
    assert plan.missing == {"attn.qkv.bias": (absent,)}


@pytest.mark.parametrize("odd", [(4, 6), (4,), (4, 5, 1)])
def test_a_concat_of_other_shapes_is_a_wrong_shape(odd: Shape) -> None:
    theirs = {"attn.to_q.weight": (4, 5), "attn.to_k.weight": (4, 5), "attn.to_v.weight": odd}
    plan = make_plan(table(CONCAT), theirs, {"attn.qkv.weight": (12, 5)})
    assert set(plan.wrong_shape) == {"attn.qkv.weight"}


@given(st.sets(st.sampled_from([f"{part}.{n}" for part in "ab" for n in range(9)])))
def test_split_and_concat_and_back_are_the_identity(chosen: set[str]) -> None:
    bound_map = table("""
[[rule]]
theirs = "a.{n}.{p}"
ours = ["x.{n}.{p}", "y.{n}.{p}"]

[[rule]]
theirs = ["b.{n}.0.{p}", "b.{n}.1.{p}"]
ours = "z.{n}.{p}"
""")
    ends = {"a": ["bias"], "b": ["0.bias", "1.bias"]}
    theirs = {f"{name}.{end}" for name in chosen for end in ends[name[0]]}
    ours = {name for key in theirs for name in names(bound_map, key)}
    assert len(ours) == sum(2 if name[0] == "a" else 1 for name in chosen)
    assert {key for name in ours for key in keys(bound_map, name) or ()} == theirs


OPS = """
[[rule]]
theirs = "text_projection"
ours = "text_projection.weight"
op = "transpose"

[[rule]]
theirs = "proj_out.weight"
ours = "proj.weight"
op = "conv1x1"
"""


def test_transpose_and_conv1x1() -> None:
    theirs: dict[str, Shape] = {"text_projection": (3, 7), "proj_out.weight": (4, 5, 1, 1)}
    plan = make_plan(table(OPS), theirs, {"text_projection.weight": (7, 3), "proj.weight": (4, 5)})
    assert complete(plan)
    assert {name: source.rule.op for name, source in plan.sources.items()} == {
        "text_projection.weight": "transpose",
        "proj.weight": "conv1x1",
    }
    assert keys(table(OPS), "text_projection.weight") == ("text_projection",)


@pytest.mark.parametrize(
    ("key", "shape", "name"),
    [
        ("text_projection", (7, 3), "text_projection.weight"),  # already transposed
        ("text_projection", (7,), "text_projection.weight"),
        ("proj_out.weight", (5, 4), "proj.weight"),
        ("proj_out.weight", (4, 5, 3, 3), "proj.weight"),
        ("proj_out.weight", (5, 4, 1, 1), "proj.weight"),
    ],
)
def test_operations_on_other_shapes_are_a_wrong_shape(key: str, shape: Shape, name: str) -> None:
    expected = {"text_projection.weight": (7, 3), "proj.weight": (4, 5)}[name]
    plan = make_plan(table(OPS), {key: shape}, {name: expected})
    source = plan.wrong_shape[name]
    assert source.keys == (key,)
    assert source.shape({key: shape}) != expected
    assert source.rule.table == "test.toml"


ALSO = """
[leaf.attention]
"to_q" = "q"

[also.attention]
"query" = "q"

[[rule]]
theirs = "attn"
ours = "attention"
leaf = "attention"

[[rule]]
theirs = "out.{p}"
ours = "to_out.{p}"
also = ["proj.{p}", "proj_attn.{p}"]
"""


@pytest.mark.parametrize(
    ("current", "old", "name"),
    [
        ("attn.to_q.weight", "attn.query.weight", "attention.q.weight"),
        ("out.bias", "proj.bias", "to_out.bias"),
        ("out.bias", "proj_attn.bias", "to_out.bias"),
    ],
)
def test_also_is_read_and_never_written(current: str, old: str, name: str) -> None:
    bound_map = table(ALSO)
    assert names(bound_map, current) == names(bound_map, old) == [name]
    assert keys(bound_map, name) == (current,)
    assert complete(make_plan(bound_map, {old: (2,)}, {name: (2,)}))
    plan = make_plan(bound_map, {old: (2,), current: (2,)}, {name: (2,)})
    assert plan.duplicate == {name: (old, current)}
    assert plan.sources == {}


def test_ignore() -> None:
    head = HEAD + 'ignore = { "(model_ema\\\\.)?decay" = "an average", "out\\\\.bias" = "never, as a rule names it" }\n'
    plan = make_plan(
        table(ALSO, head=head),
        {"model_ema.decay": (), "decay": (), "model_ema.decay.x": (), "out.bias": (2,)},
        {"to_out.bias": (2,)},
    )
    assert plan.ignored == {"model_ema.decay": "an average", "decay": "an average"}
    assert plan.unexpected == {"model_ema.decay.x": ()}
    assert set(plan.sources) == {"to_out.bias"}


PREFIXED = """
[[rule]]
theirs = "norm.{p}"
ours = "norm.{p}"

[[rule]]
theirs = "../logit_scale"
ours = "scale"
"""


def test_prefix() -> None:
    bound_map = table(PREFIXED, head=HEAD + 'prefix = "model."\n')
    assert names(bound_map, "model.norm.bias") == ["norm.bias"]
    assert names(bound_map, "norm.bias") == names(bound_map, "model.logit_scale") == []
    assert names(bound_map, "logit_scale") == ["scale"]
    assert keys(bound_map, "norm.bias") == ("model.norm.bias",)
    assert keys(bound_map, "scale") == ("logit_scale",)


def test_prefixes_are_all_read_and_the_first_is_written() -> None:
    bound_map = table(PREFIXED, head=HEAD + 'prefix = ["text_model.", ""]\n')
    assert names(bound_map, "text_model.norm.bias") == names(bound_map, "norm.bias") == ["norm.bias"]
    assert keys(bound_map, "norm.bias") == ("text_model.norm.bias",)
    plan = make_plan(bound_map, {"text_model.norm.bias": (2,), "norm.bias": (2,)}, {"norm.bias": (2,)})
    assert set(plan.duplicate) == {"norm.bias"}


# --- what is wrong with a checkpoint


def test_missing_unexpected_and_wrong_shape() -> None:
    plan = make_plan(
        table(ALSO),
        {"out.weight": (2, 3), "stray": (1,), "attn.to_q.bias": (4,)},
        {"to_out.weight": (3, 2), "to_out.bias": (2,), "nobody.knows": (1,)},
    )
    assert plan.sources == {}
    assert plan.missing == {"to_out.bias": ("out.bias",), "nobody.knows": ()}
    assert plan.unexpected == {"stray": (), "attn.to_q.bias": ("attention.q.bias",)}
    assert set(plan.wrong_shape) == {"to_out.weight"}


# --- what is wrong with a table


def rule(theirs: str, ours: str, more: str = "") -> str:
    """A [[rule]]."""
    return f'[[rule]]\ntheirs = "{theirs}"\nours = "{ours}"\n{more}\n'


def test_two_rules_that_claim_a_key() -> None:
    bound_map = table(rule("a.{n}.weight", "x.{n}.weight") + rule("a.0.{p}", "y.{p}"))
    assert names(bound_map, "a.1.weight") == ["x.1.weight"]
    for claim in (bound_map.parameters, lambda key: make_plan(bound_map, {key: (1,)}, {})):
        with pytest.raises(TableError, match=r"two rules claim a\.0\.weight: .*; ") as caught:
            claim("a.0.weight")
        assert all(f"test.toml rule {number}: " in str(caught.value) for number in (1, 2))


def test_a_name_that_is_produced_twice() -> None:
    bound_map = table(rule("a.{n}", "x.{n}") + rule("b", "x.0"))
    assert keys(bound_map, "x.1") == ("a.1",)
    with pytest.raises(TableError, match=r"two rules produce x\.0: .*; ") as caught:
        bound_map.source("x.0")
    assert all(f"test.toml rule {number}: " in str(caught.value) for number in (1, 2))
    assert set(make_plan(bound_map, {"a.0": (1,), "b": (1,)}, {"x.0": (1,)}).duplicate) == {"x.0"}


WRONG: dict[str, tuple[str, str]] = {
    "not TOML": ("[[rule", "not TOML"),
    "unknown leaf": (rule("a", "b", 'leaf = "nothing"'), r"rule 1: there is no \[leaf.nothing\]"),
    "unknown op": (rule("a", "b", 'op = "reverse"'), "rule 1: op = 'reverse' must be 'copy'"),
    "unknown field": (rule("a", "b", 'comment = "x"'), "rule 1: unknown field comment"),
    "second rule": (rule("a", "b") + rule("c", "d", "fro = {}"), "rule 2: unknown field fro"),
    "two lists": ('[[rule]]\ntheirs = ["a", "b"]\nours = ["c", "d"]\n', "rule 1: both sides are lists"),
    "capture on one side": (rule("a.{n}", "b"), "different captures"),
    "other captures": (rule("a.{n}", "b.{m}"), "different captures"),
    "capture in part of a list": ('[[rule]]\ntheirs = ["a.{n}", "b"]\nours = "c.{n}"\n', "different captures"),
    "code in a hole": (rule("a.{__import__('os')}", "b"), "cannot compute"),
    "power in a hole": (rule("a.{i**2}", "b.{i}", 'for = { i = "3" }'), "cannot compute"),
    "unknown name in a hole": (rule("a.{i+k}", "b.{i}", 'for = { i = "3" }'), "cannot compute"),
    "no expression in a hole": (rule("a.{1+}", "b"), "cannot compute"),
    "code in a bound": (rule("a.{i}", "b.{i}", "for = { i = \"__import__('os')\" }"), "bound cannot be computed"),
    "unknown name in a bound": (rule("a.{i}", "b.{i}", 'for = { i = "levels" }'), "bound cannot be computed"),
    "no expression in a bound": (rule("a.{i}", "b.{i}", 'for = { i = "3 +" }'), "bound cannot be computed"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tables(text: str, message: str) -> None:
    with pytest.raises(TableError, match=message) as caught:
        table(text)
    assert "test.toml" in str(caught.value)


def test_a_concat_with_a_scalar_is_a_wrong_shape() -> None:
    theirs: dict[str, Shape] = {"attn.to_q.bias": (4,), "attn.to_k.bias": (), "attn.to_v.bias": (4,)}
    assert set(make_plan(table(CONCAT), theirs, {"attn.qkv.bias": (8,)}).wrong_shape) == {"attn.qkv.bias"}


def test_a_loop_that_claims_a_key_twice() -> None:
    bound_map = table(rule("a.{i//2}", "b.{i}", 'for = { i = "4" }'))
    with pytest.raises(TableError, match=r"a\.0"):
        make_plan(bound_map, {"a.0": (1,), "a.1": (1,)}, {f"b.{i}": (1,) for i in range(4)})


SILENT: dict[str, str] = {
    "no such side": '[[rule]]\ntheirs = "a"\n',
    "no rule": "",
    "division by zero in a hole": rule("a.{i//0}", "b.{i}", 'for = { i = "2" }'),
    "division by zero in a bound": rule("a.{i}", "b.{i}", 'for = { i = "2 % 0" }'),
    "a capture twice in one part": rule("a_{n}_{n}", "b.{n}"),
    "a spelling beside a leaf": '[leaf.l]\n"x" = "y"\n' + rule("a", "b", 'leaf = "l"\nalso = "c"'),
    "spellings of no leaf": '[also.l]\n"x" = "y"\n' + rule("a", "b"),
    "a transposed split": '[[rule]]\ntheirs = "a"\nours = ["b", "c"]\nop = "transpose"\n',
    "a copy of two": '[[rule]]\ntheirs = ["a", "b"]\nours = "c"\nop = "copy"\n',
    "a split of two": '[[rule]]\ntheirs = ["a", "b"]\nours = "c"\nop = "split"\n',
}


@pytest.mark.parametrize("text", SILENT.values(), ids=SILENT.keys())
def test_more_wrong_tables(text: str) -> None:
    with pytest.raises(TableError, match=r"test\.toml"):
        table(text)


@pytest.mark.parametrize("line", ["ignroe = {}", 'ignore = { "(" = "not a pattern" }'])
def test_wrong_heads(line: str) -> None:
    with pytest.raises(TableError, match=r"test\.toml"):
        table(rule("a", "b"), head=HEAD + line + "\n")


# --- tables of strangers

LOOP = 'for = { i = "1000000000" }'
BOUNDED: dict[str, tuple[str, str]] = {
    "a number for a text": ('[[rule]]\ntheirs = 1\nours = "b"\n', "rule 1: theirs = 1 must be a text"),
    "a number in a list": ('[[rule]]\ntheirs = ["a", 1]\nours = "b"\n', "rule 1: theirs = .* must be a text"),
    "a list for a loop": (rule("a.{i}", "b.{i}", "for = { i = [1] }"), "rule 1: for = .* must be"),
    "a number for a leaf": (rule("a", "b", "leaf = 1"), "rule 1: leaf = 1 must be"),
    "a text for a truth": (rule("a", "b", 'write = "no"'), "rule 1: write = 'no' must be true or false"),
    "a loop that is no name": (rule("a", "b", 'for = { "a b" = 1 }'), "rule 1: for = .* must be"),
    "a section that is a number": ("leaf = 1\n" + HEAD, "leaf = 1 must be"),
    "rules that are numbers": ("rule = [1]\n" + HEAD, r"rule = \[1\] must be"),
    "a nameless capture": ('[dims]\nd = { count = "a" }\n' + rule("a", "b"), "no number to count by"),
    "a capture of words": ('[dims]\nd = { count = "a.{p}" }\n' + rule("a", "b"), "no number to count by"),
    "a loop of 10^9": (rule("a.{i}", "b.{i}", LOOP), "rule 1: .*stands for over 50000 names"),
    "a loop of 10^30": (rule("a.{i}", "b.{i}", f'for = {{ i = "{10**30}" }}'), "bound cannot be computed"),
    "loops of 10^4 cubed": (
        rule("a.{i}.{j}.{k}", "b.{i}.{j}.{k}", 'for = { i = "10000", j = "10000", k = "10000" }'),
        "stands for over 50000 names",
    ),
    "rules that add up": ("".join(rule(f"a{n}.{{i}}", "b", "for = { i = 9999 }") for n in "12345"), "rule 3: .*50000"),
    "a deep expression": (rule("a.{" + "(" * 5000 + "1" + ")" * 5000 + "}", "b"), "rule 1: theirs = .* 200 characters"),
    "a long expression": (rule("a.{" + "1+" * 60 + "1}", "b"), "rule 1: .*has 121 characters, over 100"),
    "a large number": (rule("a.{" + "*".join(["999999999"] * 9) + "}", "b"), "rule 1: .*beyond 1000000000"),
    "a prefix with a hole": (HEAD + 'prefix = "{i+1}"\n' + rule("a", "b"), r"\[map\]: prefix = .* without \{"),
    "captures side by side": (rule("a.{x}{y}{z}", "b.{x}.{y}.{z}"), "rule 1: .*more than two captures"),
    "captures by the hundred": (
        rule("a.{x}_{i}", "b.{x}_{i}", "for = { i = 99 }"), "rule 1: .*one of over 64 captures at its place",
    ),
    "too many rules": (rule("a", "b") * 301, "rule = .* must be a list of 0 to 300"),
    "too many names of a rule": ('[[rule]]\ntheirs = ["a"' + ', "a"' * 9 + ']\nours = "b"\n', "rule 1: theirs"),
    "a deep table": ("x = " + "[" * 5000 + "]" * 5000 + HEAD, "nested too deeply|unknown section"),
    "a long table": ("#" * 200_001, "characters, over the 200000 of any table"),
    "a number of 5,000 digits": ("x = " + "9" * 5000 + HEAD, "not TOML"),
}  # fmt: skip


def use(keymap: KeyMap) -> BoundMap:
    """A table, bound as the detection binds it."""
    return keymap.bind(keymap.probe(["a.1.b"], ""))


@pytest.mark.parametrize(("text", "message"), BOUNDED.values(), ids=BOUNDED.keys())
def test_hostile_tables_are_refused_at_once(text: str, message: str) -> None:
    def refuse() -> None:
        with pytest.raises(TableError, match=message) as caught:
            use(KeyMap.parse(text if "[map]" in text else HEAD + text, "test.toml"))
        assert "test.toml" in str(caught.value)
        assert len(str(caught.value)) < 600

    assert seconds_of(refuse, 2) < 2


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b", "(a|a)*b", "(a?)*b", "(.*)*", "(a{1,9}){9}", "a.*.*.*b", "(a|a)(a|a)" * 9 + "b", "a?" * 30 + "b",
        r"(a)\\1", "(?P<x>a)(?P=x)", "(?=a)a", "(?i)a", "(?>a)", "(?(1)a|b)", "(", ")", "[", "a**", "a{99999999999}",
        "\\\\", "(?P<1>a)", "a|*", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("section", ["ignore", "names", "refused"])
def test_patterns_that_may_take_for_ever(pattern: str, section: str) -> None:
    """What is read of them is read in no time, too, where a name comes as it would have to."""
    where = {
        "ignore": "[map.ignore]",
        "names": "[names]",
        "refused": '[lora]\nparts = ["alpha"]\nprefix."x" = "unet"\n',
    }
    text = f'{HEAD}{where[section]}\n{"[lora.refused]" if section == "refused" else ""}\n"{pattern}" = "x"\n'

    def match() -> None:
        with suppress(TableError):
            bound_map = KeyMap.parse(text, "test.toml").bind()
            for name in ("a" * 250, "a" * 100_000, "x" * 250):
                bound_map.reason_to_ignore(name)
                bound_map.describe(name)

    assert seconds_of(match, 0.5) < 0.5


def test_what_patterns_can_say() -> None:
    for pattern in (
        "a.*",
        r"(.*\.)?b",
        "[]a]+x",
        "[^]]*",
        r"\w+\.(a|b)_\w+",
        "a{3}b?",
        "(?P<x>a|b)c",
        "(?<!a)b*?",
        "a*+",
    ):
        assert expression(pattern)
    for pattern in ("(a+)+", "a.*b.*c.*", r"(a)\1"):
        with pytest.raises(ValueError, match=r"may take for ever|ways|no table may use"):
            expression(pattern)


def test_a_meaning_is_text_and_captures() -> None:
    """No format: it would reach into objects, or ask for a gigabyte of spaces."""
    text = HEAD + "[names]\n'(?P<n>a)(?P<m>b)?' = 'the {n}{m} and {n.__class__}'\n"
    with pytest.raises(TableError, match=r"\[names\].*\{n.__class__\}"):
        KeyMap.parse(text, "test.toml")
    assert table("[names]\n'(?P<n>a)(?P<m>b)?' = 'the {n}{m}'\n").describe("a") == "the a"


@pytest.mark.parametrize("kind", ["pipe", "folder", "gone", "large", "binary"])
def test_files_that_are_no_tables(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "gone":
            path.symlink_to("nowhere")
        case "large":
            path.write_bytes(b"#" * 300_000)
        case "binary":
            path.write_bytes(b"\xff\xfe")
    with pytest.raises(TableError, match=r"x\.toml"):
        load_tables(tmp_path)


def test_a_folder_of_too_many_tables(tmp_path: Path) -> None:
    for n in range(101):
        (tmp_path / f"{n}.toml").touch()
    with pytest.raises(TableError, match="holds 101 tables, over the 100"):
        load_tables(tmp_path)
