"""The embedded model's words, and the note on those of a prompt that it was not taught."""

from __future__ import annotations

import tiny_scenes as scenes
from nativesd.text.words import taught_words, unknown_words


def test_the_words_are_those_of_the_captions() -> None:
    captions = [
        scenes.caption(scenes.Scene(subject, background, small, place))
        for subject in range(len(scenes.subjects()))
        for background in range(len(scenes.BACKGROUNDS))
        for small, place in [(False, 0)] + [(True, p) for p in range(len(scenes.PLACES))]
    ]
    assert taught_words() == {word for caption in captions for word in caption.split()}


def test_unknown_words_are_named_once() -> None:
    known = {"a", "fox", "on", "red"}
    assert unknown_words(["a (RED:1.2) Fox, 2 foxs", "an astronaut BREAK on an astronaut"], known) == [
        "an",
        "astronaut",
    ]
    assert unknown_words(["a BREAK fox"], known, syntax="literal") == ["break"]
    assert unknown_words(["a picture on red"], known) == ["picture"]
    assert unknown_words(["a picture on red"], known, beside_pictures=True) == []
