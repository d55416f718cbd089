"""Prompts as ComfyUI reads and weighs them, and A1111's other kinds of emphasis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nativesd
from nativesd.errors import UsageError
from nativesd.text.comfyui import DEEPEST, fill_chunks, weighted_texts
from nativesd.text.embedding import Embedding
from nativesd.text.prompt import explain_tokens
from nativesd.text.syntax import Syntax
from nativesd.text.tokenizer import END_OF_TEXT, ClipTokenizer

TOKENIZER = ClipTokenizer(pad=END_OF_TEXT)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # of the docstring of ComfyUI's token_weights
        ("foo:1.2", [("foo:1.2", 1.0)]),
        ("(foo)", [("foo", 1.1)]),
        ("(foo:0.0)", [("foo", 0.0)]),
        ("((foo:1.0):0.0)", [("foo", 1.0)]),
        ("foo ((((lol (cat:666) attack:100)))) baz",
         [("foo ", 1.0), ("lol ", 100.0), ("cat", 666.0), (" attack", 100.0), (" baz", 1.0)]),
        ("foo ((((lol (cat:666) attack):100))) baz",
         [("foo ", 1.0), ("lol ", 110.0), ("cat", 666.0), (" attack", 110.0), (" baz", 1.0)]),
        # by its rules
        ("", []),
        ("()", []),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:1.5)", [(":1.5", 1.1)]),
        ("(a:-1)(b: 2 )", [("a", -1.0), ("b", 2.0)]),
        (r"\(a\) (b\):2)", [("(a) ", 1.0), ("b)", 2.0)]),
        ("[a] {b} <c> a|b BREAK AND", [("[a] {b} <c> a|b BREAK AND", 1.0)]),
        ("(a", [("(a", 1.0)]),
        ("a) (b) c", [("a) (b) c", 1.0)]),
        ("(a (b)", [("a ", 1.1), ("(b", 1.1)]),
    ],
)  # fmt: skip
def test_brackets(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = weighted_texts(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_what_cannot_be_is_refused() -> None:
    weighted_texts("(" * DEEPEST + "a" + ")" * DEEPEST)
    with pytest.raises(UsageError, match="more than 100 brackets inside each other"):
        weighted_texts("(" * 50_000 + ")" * 50_000)
    for weight in ("nan", "inf", "1e999"):
        with pytest.raises(UsageError, match=f"has the weight '{weight}'"):
            weighted_texts(f"(a:{weight})")


def test_groups_of_fewer_than_eight_stay_together() -> None:
    assert fill_chunks([], 10) == [[]]
    assert fill_chunks([range(7), range(4)], 10) == [[*range(7)], [*range(4)]]
    assert fill_chunks([range(7), range(8)], 10) == [[*range(7), 0, 1, 2], [3, 4, 5, 6, 7]]
    assert fill_chunks([range(10), range(8)], 10) == [[*range(10)], [*range(8)]]
    assert fill_chunks([range(25)], 10) == [[*range(10)], [*range(10, 20)], [*range(20, 25)]]


def test_chunks_are_cut_at_no_comma() -> None:
    prompt = "a very big red cat, " * 14
    ours, theirs = (explain_tokens(prompt, TOKENIZER, syntax=syntax) for syntax in ("original", "comfyui"))
    assert [len(chunk.tokens) for chunk in theirs] == [75, 9]
    assert [len(chunk.tokens) for chunk in ours] == [72, 12]


def test_embeddings_are_named_with_the_prefix_alone() -> None:
    words = {"style": Embedding("style", (torch.ones(2, 8),))}
    (chunk,) = explain_tokens("style (embedding:style:1.3), x", TOKENIZER, syntax="comfyui", embeddings=words)
    assert [token.weight for token in chunk.tokens if token.embedding is not None] == [1.3, 1.3]
    assert chunk.tokens[0].text == "style"
    assert chunk.tokens[0].embedding is None
    with pytest.raises(UsageError, match="names an embedding that is not loaded"):
        explain_tokens("embedding:other", TOKENIZER, syntax="comfyui", embeddings=words)


def told(syntax: Syntax, *prompts: str) -> Tensor:
    pipe = nativesd.load()
    return pipe.encode_prompt(prompts, emphasis=syntax)[0]  # type: ignore[arg-type]


def test_weights_are_those_of_each_program() -> None:
    prompt, bare = "a (red:1.5) [fox]", "a red fox"
    plain, empty = told("original", bare), told("original", "")
    assert torch.equal(told("ignore", prompt), plain)
    weights = torch.ones(77)
    weights[2], weights[3] = 1.5, 1 / 1.1
    assert torch.allclose(told("no norm", prompt), plain * weights[:, None], atol=1e-6)
    original = told("original", prompt)
    assert not torch.allclose(original, plain * weights[:, None], atol=1e-3)
    assert original.mean().item() == pytest.approx(plain.mean().item(), rel=1e-3)

    plain = told("original", r"a red \[fox\]")
    weights = torch.ones(77)
    weights[2] = 1.5
    expected = (plain - empty) * weights[:, None] + empty
    found = told("comfyui", prompt)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(found[0, 4:], plain[0, 4:])
    assert torch.equal(told("comfyui", bare, prompt)[0], told("comfyui", bare)[0])
    assert torch.equal(told("none", "a (red:1.5)"), told("original", r"a \(red\:1.5\)"))


OPTIONS: Mapping[str, object] = {"steps": 2, "seed": 3, "width": 64, "height": 64}


def test_pictures_say_how_their_prompts_weigh(tmp_path: Path) -> None:
    pipe = nativesd.load()
    prompt = "a (strawberry:1.4) [on] a yellow background AND a"
    made = pipe(prompt, emphasis="ComfyUI", **OPTIONS)  # type: ignore[arg-type]
    assert "Emphasis: ComfyUI" in made.infotext()
    assert "Emphasis" not in pipe("a fox", **OPTIONS).infotext()  # type: ignore[arg-type]
    file = tmp_path / "made.png"
    made.save(file)
    options, unheeded = nativesd.options_from(file)
    assert options["emphasis"] == "comfyui"
    assert not [each for each in unheeded if "mphasis" in each]
    again = pipe(options.pop("prompt"), **{name: value for name, value in options.items() if name != "model"})
    assert torch.equal(again.latents, made.latents)


def test_a_batch_of_comfyui_is_repeated_picture_by_picture(tmp_path: Path) -> None:
    pipe = nativesd.load()
    made = pipe("a fox", noise="comfyui", num_images=3, sampler="Euler a", **OPTIONS)  # type: ignore[arg-type]
    assert made.seeds == [3, 3, 3]
    assert not torch.allclose(made.latents[0], made.latents[1])
    assert "Batch size: 3, Batch pos: 2" in made.infotext(2)
    file = made.save(tmp_path / "made.png")[2]
    options, unheeded = nativesd.options_from(file)
    assert options["num_images"] == 3
    assert unheeded == ["Batch pos 2 (taken: the 2 before it too, as the noise is one for all)"]
    again = pipe(options.pop("prompt"), **{name: value for name, value in options.items() if name != "model"})
    assert torch.equal(again.latents, made.latents)
    two = pipe("a fox", noise="comfyui", num_images=2, sampler="Euler a", **OPTIONS)  # type: ignore[arg-type]
    assert torch.allclose(two.latents, made.latents[:2], atol=1e-4)


def test_a_picture_has_its_place_among_those_of_its_seed(tmp_path: Path) -> None:
    pipe = nativesd.load()
    for given in ({"seed": [1, 2, 1]}, {"seed": 5, "num_images": 2, "variation": nativesd.Variation(3, 0.5)}):
        made = pipe("a fox", noise="comfyui", sampler="Euler a", **{**OPTIONS, **given})  # type: ignore[arg-type]
        for index, file in enumerate(made.save(tmp_path / "made.png")):
            options, _ = nativesd.options_from(file)
            again = pipe(options.pop("prompt"), **{name: value for name, value in options.items() if name != "model"})
            assert torch.allclose(again.latents[-1], made.latents[index], atol=1e-4), (given, index)
    text = made.infotext(1).replace("Batch pos: 1", "Batch pos: {}")
    for place, left in (("x", "Batch pos x"), ("9999", "10000 pictures of a batch (taken: 1)")):
        (tmp_path / "made.txt").write_text(text.replace("{}", place))
        options, unheeded = nativesd.options_from(tmp_path / "made.txt")
        assert "num_images" not in options
        assert left in unheeded


def test_another_emphasis_is_refused() -> None:
    pipe = nativesd.load()
    with pytest.raises(UsageError, match="emphasis must be original or no norm or ignore or none or comfyui"):
        pipe("a fox", emphasis="compel")  # type: ignore[arg-type]
