"""LoRAs that prompts name."""

from __future__ import annotations

import pytest

from clock import seconds_of
from nativesd.errors import UsageError
from nativesd.text.tags import Tag, take_tags


@pytest.mark.parametrize(
    ("prompt", "bare", "tags"),
    [
        ("a cat", "a cat", ()),
        ("a cat <lora:ink>", "a cat", (Tag("ink"),)),
        ("a cat, <lora:ink v2:0.8>, sea", "a cat,, sea", (Tag("ink v2", 0.8, 0.8),)),
        ("<lora:a:0.5:0.25><LyCO:b:1> x", "x", (Tag("a", unet=0.25, text=0.5), Tag("b"))),
        ("x <lora:a:te=0.5:unet=0.8>", "x", (Tag("a", unet=0.8, text=0.5),)),
        ("x <lora:a:0.7:unet=0.2>", "x", (Tag("a", unet=0.2, text=0.7),)),
        (r"x \<lora:a:1>", r"x \<lora:a:1>", ()),
        ("(x <lora:a:1>:1.2)", "(x:1.2)", (Tag("a"),)),
    ],
)
def test_tags_are_taken_out(prompt: str, bare: str, tags: tuple[Tag, ...]) -> None:
    assert take_tags(prompt) == (bare, tags)


@pytest.mark.parametrize("tag", ["<lora:a:much>", "<lora:a:nan>", "<lora:a:1:1:1>", "<lora:a:lbw=ALL>", "<lora:a:>",
                                 "<lora:a:te=1:TE=0.5>"])  # fmt: skip
def test_what_a_tag_cannot_be(tag: str) -> None:
    with pytest.raises(UsageError, match=f"{tag} in the prompt"):
        take_tags(f"a cat {tag}")


@pytest.mark.parametrize("text", ["<lora:" * 100_000, "<lora:a" + ":1" * 300_000, " " * 30_000 + "<"])
def test_no_prompt_takes_long(text: str) -> None:
    assert seconds_of(lambda: take_tags(text), 2) < 2
