"""Prompts to what the UNet takes: chunks through the text encoders, weighted, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from nativesd.config import TextEncoderConfig
from nativesd.errors import NativesdError, SourceError, UsageError
from nativesd.text.embedding import Embedding
from nativesd.text.prompt import NO_EMBEDDINGS, Chunk, parse_prompt, split_chunks
from nativesd.text.syntax import Syntax
from nativesd.text.tokenizer import ClipTokenizer

Text = str | tuple[str, str]
"""A prompt, or the first text encoder's and that of the others."""

MAX_CHUNKS = 500
"""Of one length for all prompts of a call: 79 million numbers for SDXL"""
NO_MEAN = 1e-4
"""A mean below this part of the root mean square is rounding; that of the embedded model's is 0.01 and more."""


class EncoderOutput(Protocol):
    """What a text encoder returns."""

    @property
    def hidden(self) -> Tensor:
        """The context (B, T, width)."""

    @property
    def pooled(self) -> Tensor:
        """The end-of-text embedding (B, P)."""


class Encoder(Protocol):
    """A text encoder, as `nativesd.models.clip.TextEncoder`."""

    config: TextEncoderConfig
    token_embedding: nn.Embedding

    def __call__(self, tokens: Tensor, *, embedded: Tensor | None = None, hidden: int | None = None) -> EncoderOutput:
        """(B, T) int64; what the others mean is said there."""


def encode_prompts(
    prompts: Sequence[Text],
    encoders: Sequence[Encoder],
    tokenizers: Sequence[ClipTokenizer],
    *,
    syntax: Syntax = "original",
    clip_skip: int | None = None,
    embeddings: Mapping[str, Embedding] = NO_EMBEDDINGS,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """`encode_each` with all contexts in one tensor (B, 77 n, C), n the least common multiple of the chunks.

    A context that is repeated k times says the same (see `conditioning.groups`), but costs as much: texts that differ
    much in length are cheaper one by one.
    """
    contexts, pooled = encode_each(
        prompts, encoders, tokenizers, syntax=syntax, clip_skip=clip_skip, embeddings=embeddings, device=device
    )
    common = math.lcm(*map(len, contexts))
    _bound([len(context) // tokenizers[0].length for context in contexts], common // tokenizers[0].length)
    return torch.stack([context.repeat(common // len(context), 1) for context in contexts]), pooled


def encode_each(
    prompts: Sequence[Text],
    encoders: Sequence[Encoder],
    tokenizers: Sequence[ClipTokenizer],
    *,
    syntax: Syntax = "original",
    clip_skip: int | None = None,
    embeddings: Mapping[str, Embedding] = NO_EMBEDDINGS,
    device: torch.device,
) -> tuple[list[Tensor], Tensor]:
    """Contexts (77 n_i, C), the encoders' states side by side, and the last encoder's pooled embedding (B, P).

    syntax      how the prompts are read, and how their words are weighed
    clip_skip   the layer whose states are the context, counted from the end: see `hidden_layer`
    embeddings  the textual inversions that the prompts can name

    Of a prompt with a text for either encoder, the one with fewer chunks goes on with empty ones. Chunks are encoded on
    their own and joined along T; pooled is the first chunk's, unweighted. Raises UsageError for
    syntax that is not supported, a layer that is not there, and embeddings that do not fit the encoders.
    """
    layers = [hidden_layer(encoder.config, clip_skip) for encoder in encoders]
    chunks = []
    for i, tokenizer in enumerate(tokenizers):
        texts = [prompt if isinstance(prompt, str) else prompt[min(i, 1)] for prompt in prompts]
        parsed = [parse_prompt(text, syntax=syntax, embeddings=embeddings) for text in texts]
        chunks.append([split_chunks(parts, tokenizer, syntax) for parts in parsed])
    for prompt, columns in zip(prompts, zip(*chunks, strict=True), strict=True):
        if not isinstance(prompt, str):
            most = max(map(len, columns))
            for column in columns:
                column += [Chunk(())] * (most - len(column))
    counts = [[len(of_prompt) for of_prompt in of_tokenizer] for of_tokenizer in chunks]
    if any(other != counts[0] for other in counts):
        raise SourceError("the model's tokenizers disagree on a prompt's length, so its text encodings do not match")
    _bound(counts[0], max(counts[0]))
    widths = [encoder.config.width for encoder in encoders]
    states = []
    for i, (encoder, tokenizer, layer) in enumerate(zip(encoders, tokenizers, layers, strict=True)):
        rows = [chunk for of_prompt in chunks[i] for chunk in of_prompt]
        weighed = any(token.weight != 1 for chunk in rows for token in chunk.tokens)
        if weighed and syntax == "comfyui":
            rows.append(Chunk(()))
        ids = [tokenizer.row([token.id for token in chunk.tokens]) for chunk in rows]
        if (highest := max(map(max, ids))) >= encoder.config.vocabulary or min(map(min, ids)) < 0:
            raise SourceError(
                f"the model's tokenizer gives the id {highest}, and its text encoder has {encoder.config.vocabulary} "
                "words: they do not belong together"
            )
        tokens = torch.tensor(ids, device=device)
        output = encoder(tokens, embedded=_embedded(encoder, tokens, rows, widths, i), hidden=layer)
        name = f"text encoder {i + 1}" if len(encoders) > 1 else "text encoder"
        require_finite(output.hidden, name, output.hidden.dtype)
        require_finite(output.pooled, name, output.pooled.dtype)
        states.append(_weigh(output.hidden, rows, syntax) if weighed else output.hidden)
    hidden = torch.cat(states, dim=-1)  # (rows, T, C)
    starts = [0, *accumulate(counts[0])][:-1]
    contexts = [chunks.flatten(0, 1) for chunks in torch.split(hidden, counts[0])]  # (k, T, C) -> (k T, C)
    return contexts, output.pooled[starts]


def require_finite(tensor: Tensor, what: str, dtype: torch.dtype) -> None:
    """Raise NativesdError, which names the component `what` that runs in `dtype`, where a number is not finite."""
    if not tensor.is_meta and not tensor.isfinite().all():  # on meta there are no numbers
        why = "its weights are broken" if dtype == torch.float32 else f"it may overflow in {str(dtype)[6:]}"
        hint = "get the file again" if dtype == torch.float32 else "load the model with dtype=float32"
        raise NativesdError(f"the {what} gives numbers that are not finite: {why}; {hint}")


def _bound(counts: Sequence[int], common: int) -> None:
    """Raise UsageError where prompts of so many chunks come to a length, in chunks, that is beyond the bound."""
    if common > MAX_CHUNKS:
        raise UsageError(
            f"the prompts have {', '.join(map(str, counts))} chunks, which are {common} for all of one length, over "
            f"{MAX_CHUNKS}: shorten them, or make their pictures in several calls"
        )


def hidden_layer(config: TextEncoderConfig, clip_skip: int | None) -> int | None:
    """The index, from the end, into an encoder's layers that `clip_skip` means; None: as the model was trained.

    1 is the last layer of the published encoder, 2 the penultimate, as in A1111 and ComfyUI (diffusers counts one less
    for SD1.x and two less for SDXL). Whether the final norm is applied does not change. SD2.x was trained with the
    penultimate layer, and its files end with that. Raises UsageError for a layer that is not there.
    """
    if clip_skip is None:
        return None
    openclip = config.activation != "quick_gelu"
    left_out = 1 if openclip and config.hidden == -1 else 0
    if clip_skip == left_out == 1:
        raise UsageError(
            "clip_skip=1 is the last layer, which SD2.x's published text encoder lacks: its files end with the "
            "penultimate one, so pass 2 or more"
        )
    deepest = config.layers + left_out
    if not 1 <= clip_skip <= deepest:
        raise UsageError(f"clip_skip must be between {1 + left_out} and {deepest} for this model, not {clip_skip}")
    return left_out - clip_skip


def _embedded(
    encoder: Encoder, tokens: Tensor, rows: Sequence[Chunk], widths: Sequence[int], which: int
) -> Tensor | None:
    """The token embeddings (B, T, width) with textual inversions in their places; None where the rows have none."""
    learnt = [
        (row, column, token.embedding.fit(widths)[which][token.index])
        for row, chunk in enumerate(rows)
        for column, token in enumerate(chunk.tokens, start=1)  # behind the begin token
        if token.embedding is not None
    ]
    if not learnt:
        return None
    embedded: Tensor = encoder.token_embedding(tokens)
    at_rows, at_columns, vectors = zip(*learnt, strict=True)
    embedded[list(at_rows), list(at_columns)] = torch.stack(vectors).to(embedded)
    return embedded


def _weigh(hidden: Tensor, rows: Sequence[Chunk], syntax: Syntax) -> Tensor:
    """States (B, T, C) by their tokens' weights; ComfyUI's last row is the empty prompt's, and is left out (B - 1).

    A1111 multiplies, and then scales to the mean there was before, or not ("no norm"); the mean is over each chunk, so
    that a prompt's result does not depend on others in the batch. Sources: AUTOMATIC1111/stable-diffusion-webui
    modules/sd_emphasis.py; Comfy-Org/ComfyUI comfy/sd1_clip.py, `ClipTokenWeightEncoder`.
    """
    weights = torch.ones(hidden.shape[:2])
    for row, chunk in zip(weights, rows, strict=True):
        row[1 : 1 + len(chunk.tokens)] = torch.tensor([token.weight for token in chunk.tokens])
    before, weights = hidden.float(), weights[..., None].to(hidden.device)  # (B, T, 1)
    if syntax == "comfyui":
        empty = before[-1]
        moved = (before[:-1] - empty) * weights[:-1] + empty
        return torch.where(weights[:-1] == 1, before[:-1], moved).to(hidden.dtype)
    after = before * weights
    if syntax == "no norm":
        return after.to(hidden.dtype)
    old, new = (states.mean((1, 2), keepdim=True) for states in (before, after))
    least = NO_MEAN * before.square().mean((1, 2), keepdim=True).sqrt()
    scale = torch.where((old.abs() > least) & (new.abs() > least), old / new, 1.0)
    return (after * scale).to(hidden.dtype)
