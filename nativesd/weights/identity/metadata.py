"""What a file says of itself in words: title, base, licence, trigger words. Evidence where the tensors say nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from nativesd.weights.identity.evidence import Evidence
from nativesd.weights.identity.stated import PREDICTIONS, STATED_PREDICTION

FIELDS: Mapping[str, tuple[str, ...]] = {
    "title": ("modelspec.title", "ss_output_name", "name"),
    "author": ("modelspec.author",),
    "comment": ("ss_training_comment", "modelspec.usage_hint"),
    "licence": ("modelspec.license", "license"),
    "base by its author": ("ss_sd_model_name", "modelspec.architecture", "ss_base_model_version", "sd_checkpoint_name"),
    "prediction by its author": STATED_PREDICTION,
}
"""What is shown -> the metadata that says it, by preference (github.com/Stability-AI/ModelSpec; kohya-ss/sd-scripts,
library/sai_model_spec.py and train_util.py; the last of A1111's embeddings)."""
ARCHITECTURES = {
    "stable-diffusion-xl-v1-refiner": "refiner", "stable-diffusion-xl": "sdxl", "stable-diffusion-v2": "sd2",
    "stable-diffusion-v1": "sd1", "sdxl": "sdxl", "sd_v2": "sd2", "sd_v1": "sd1",
}  # fmt: skip
"""What `modelspec.architecture` or `ss_base_model_version` begins with -> the family."""
SHOWN = 120
"""Characters of a text that are shown."""


def stated_family(metadata: Mapping[str, str]) -> tuple[str, str]:
    """The family that the metadata names, and the field that says it; "" and "" where none does."""
    for field in ("modelspec.architecture", "ss_base_model_version"):
        said = metadata.get(field, "").strip().lower()
        for begin, family in ARCHITECTURES.items():
            if said.startswith(begin):
                return family, field
    return "", ""


def stated_text(metadata: Mapping[str, str], what: str) -> tuple[str, str]:
    """One of FIELDS as it is shown, and the metadata that says it; "" and "" where none does."""
    for field in FIELDS[what]:
        text = shown(metadata.get(field, ""))
        if text and (what != "prediction by its author" or text.lower() in PREDICTIONS):
            return text, field
    return "", ""


def trigger_words(metadata: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """What the file says its trigger words are, or the tags that its training pictures had most often; and by what."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        return tuple(filter(None, map(shown, phrase.split(",")))), "modelspec.trigger_phrase"
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({shown(str(tag)): int(number) for tag, number in tags.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return (), ""
    return tuple(tag for tag, _ in counts.most_common(3) if tag), "ss_tag_frequency"


def metadata_evidence(metadata: Mapping[str, str]) -> list[Evidence]:
    """Everything of the above that a file says, a line each."""
    out = []
    for what in FIELDS:
        text, field = stated_text(metadata, what)
        if text:
            out.append(Evidence(what, text, f"the metadata's {field}"))
    words, field = trigger_words(metadata)
    if words:
        how = "the commonest tags in " if field == "ss_tag_frequency" else ""
        out.append(Evidence("trigger words", ", ".join(words), f"{how}the metadata's {field}"))
    return out


def shown(text: str) -> str:
    """A text of a stranger's file as one line that can be printed, cut off where it is long."""
    line = "".join(c if c.isprintable() else " " for c in text[: 4 * SHOWN])
    line = " ".join(line.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."
