"""CLIP's byte-pair encoding, through the `tokenizers` library.

The vocabulary (openai/CLIP, MIT) lies in the embedded model's folder; a model's own tokenizer files win over it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from nativesd.config import TextEncoderConfig
from nativesd.errors import SourceError
from nativesd.reading import read_json
from nativesd.schema import Field, read_fields, text
from nativesd.shipped import TINY

END_OF_TEXT = 49407
DEFAULT = TINY / "tokenizer"
FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
"""What a published tokenizer is made of; a folder has some of them."""
MAX_FILE = 16_000_000
"""Bytes of a tokenizer's file; CLIP's largest has 2 million."""
PAD = (Field("pad_token", text(64)),)

# openai/CLIP clip/simple_tokenizer.py; as published in tokenizer.json of openai/clip-vit-large-patch14
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Prompts to token ids: begin, the text, end, then padding, `length` in all.

    `pad` is 49407 (end of text) for SD1.x and SDXL's first encoder, 0 ("!") for SD2.x and OpenCLIP bigG.
    """

    def __init__(self, folder: Path = DEFAULT, *, pad: int, length: int = 77) -> None:
        self._tokenizer = _read(folder)
        self.begin = self._special("<|startoftext|>", folder)
        self.end = self._special("<|endoftext|>", folder)
        self.pad = pad
        self.length = length
        self.comma: int | None = self._tokenizer.token_to_id(",</w>")

    def _special(self, token: str, folder: Path) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise SourceError(f"{folder} is not a CLIP tokenizer: its vocabulary lacks {token}")
        return number

    def tokens(self, prompt: str) -> list[int]:
        """The ids of the text alone."""
        return list(self._tokenizer.encode(prompt, add_special_tokens=False).ids)

    def spans(self, text: str) -> list[tuple[int, str]]:
        """The ids of the text, each with its characters; the ids that one character is made of all have it."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [(number, text[start:end]) for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def row(self, tokens: Sequence[int]) -> list[int]:
        """At most `length - 2` ids, with begin, end and padding around them: `length` in all."""
        row = [self.begin, *tokens, self.end]
        return row + [self.pad] * (self.length - len(row))

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """One row of `length` ids per prompt; what does not fit is cut off."""
        return [self.row(self.tokens(prompt)[: self.length - 2]) for prompt in prompts]

    def save(self, folder: Path) -> None:
        """Write vocab.json and merges.txt, and as tokenizer.json the whole way from a prompt to a row of `length` ids.

        The settings of transformers' CLIPTokenizer are beside them.
        """
        folder.mkdir(parents=True)
        self._tokenizer.model.save(str(folder))
        pad = self._tokenizer.id_to_token(self.pad) or "!"
        whole = Tokenizer.from_str(self._tokenizer.to_str())
        begin, end = ("<|startoftext|>", self.begin), ("<|endoftext|>", self.end)
        whole.post_processor = processors.TemplateProcessing(
            single=f"{begin[0]} $A {end[0]}", special_tokens=[begin, end]
        )
        whole.enable_truncation(self.length)
        whole.enable_padding(length=self.length, pad_id=self.pad, pad_token=pad)
        whole.save(str(folder / "tokenizer.json"))
        for name, data in _settings(pad, self.length).items():
            (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _settings(pad: str, length: int) -> dict[str, dict[str, Any]]:
    """tokenizer_config.json and special_tokens_map.json of transformers' CLIPTokenizer that pads with `pad`."""
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "pad_token": pad, "unk_token": end}
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": length}
    return {
        "tokenizer_config.json": {**special, **settings, "tokenizer_class": "CLIPTokenizer"},
        "special_tokens_map.json": special,
    }


def pad_token(encoder: TextEncoderConfig) -> int:
    """The padding id of a published text encoder: end of text for CLIP ViT-L, "!" (0) for the OpenCLIP ones."""
    return END_OF_TEXT if encoder.activation == "quick_gelu" else 0


def pad_id(folder: Path, default: int) -> int:
    """The padding id that a published tokenizer folder states, or `default`.

    special_tokens_map.json wins over tokenizer_config.json: in SD2.x they disagree, and the loaded tokenizer of
    the reference pads with the former's "!".
    """
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        token = read_json(folder / name).get("pad_token")
        stated = {"pad_token": token.get("content") if isinstance(token, dict) else token}
        content = read_fields(stated, PAD, str(folder / name))["pad_token"]
        number = _read(folder).token_to_id(content) if content is not None else None
        if number is not None:
            return int(number)
    return default


def _read(folder: Path) -> Tokenizer:
    """vocab.json + merges.txt, or tokenizer.json alone (as transformers 5 writes it)."""
    vocabulary, merges, single = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
    for file in (vocabulary, merges, single):
        if file.is_file() and file.stat().st_size > MAX_FILE:
            raise SourceError(f"{file} has {file.stat().st_size} bytes, more than the {MAX_FILE} of any CLIP tokenizer")
    try:
        if vocabulary.is_file() and merges.is_file():
            model = models.BPE.from_file(
                str(vocabulary), str(merges), unk_token="<|endoftext|>", end_of_word_suffix="</w>"
            )
        elif single.is_file():
            model = Tokenizer.from_file(str(single)).model
        else:
            raise SourceError(f"{folder} holds no tokenizer: expected vocab.json and merges.txt, or tokenizer.json")
    except SourceError:
        raise
    except BaseException as error:  # the library raises bare Exception, and where it gives up a BaseException
        if isinstance(error, KeyboardInterrupt | MemoryError):
            raise
        raise SourceError(f"the tokenizer files in {folder} cannot be read: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
