"""Prompts: the syntax, the chunks, and the contexts that come of them, against the diffusers pipelines."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import nativesd
from clock import seconds_of
from models.test_models import prompts as token_rows
from models.test_models import text_config
from nativesd.config import TEXT_ENCODERS
from nativesd.errors import SourceError, UsageError
from nativesd.models.clip import TextOutput
from nativesd.text.embedding import Embedding, read_embeddings
from nativesd.text.encode import encode_prompts, hidden_layer
from nativesd.text.prompt import NO_EMBEDDINGS, Piece, explain_tokens, parse_prompt
from nativesd.text.tokenizer import ClipTokenizer
from oracles import difference, text_pair, unet_inputs
from pipeline.test_pipeline import save_model

TOLERANCE = 1e-5
FORMS = ("sd15", "sd21-base", "sdxl")
CPU = torch.device("cpu")
TOKENIZER = ClipTokenizer(pad=49407)


def weights_of(prompt: str) -> list[tuple[str, float]]:
    """Text and weight of every piece of a prompt without BREAK."""
    (pieces,) = parse_prompt(prompt)
    return [(piece.text, piece.weight) for piece in pieces]


def ids_of(prompt: str, embeddings: Mapping[str, Embedding] = NO_EMBEDDINGS) -> list[list[int]]:
    return [[token.id for token in chunk.tokens] for chunk in explain_tokens(prompt, TOKENIZER, embeddings=embeddings)]


def learnt(name: str, count: int = 2, *widths: int) -> Embedding:
    """A random textual inversion, of SD1.x's width unless said otherwise."""
    generator = torch.Generator().manual_seed(len(name))
    return Embedding(name, tuple(torch.randn(count, width, generator=generator) for width in widths or (768,)))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # documented in AUTOMATIC1111/stable-diffusion-webui modules/prompt_parser.py, parse_prompt_attention
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
                (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1),
            ],
        ),
        # the wiki's page Features, "Attention/emphasis"
        ("[word]", [("word", 1 / 1.1)]),
        ("(word:0.25)", [("word", 0.25)]),
        (r"\(word\)", [("(word)", 1.0)]),
        # what follows from the same rules
        ("", []),
        ("()", []),
        ("((word))", [("word", 1.1 * 1.1)]),
        ("[[word]]", [("word", 1 / 1.1 * (1 / 1.1))]),
        ("( word : +1.5 )", [(" word ", 1.5)]),
        ("(word:-.5)", [("word", -0.5)]),
        ("(a:0)b", [("a", 0.0), ("b", 1.0)]),
        ("a (red:1.0) fox", [("a red fox", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("[a:b]", [("a:b", 1 / 1.1)]),
        ("[a:b:c]", [("a:b:c", 1 / 1.1)]),
        ("a) b] c:1.2)", [("a) b] c:1.2)", 1.0)]),
        ("a [unclosed (here", [("a ", 1.0), ("unclosed ", 1 / 1.1), ("here", 1.1 * (1 / 1.1))]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 * (1 / 1.1)), (" c", 1 / 1.1)]),
        (r"\\(a\\)", [("\\", 1.0), ("a\\", 1.1)]),
        (r"c:\dir\file" + "\\", [("c:dirfile", 1.0)]),
        # text that only looks like what is refused
        ("a|b", [("a|b", 1.0)]),
        ("(a|b)", [("a|b", 1.1)]),
        ("[(a|b)]", [("a|b", 1.1 * (1 / 1.1))]),
        ("[a|b", [("a|b", 1 / 1.1)]),
        ("[a:0.5", [("a:0.5", 1 / 1.1)]),
        ("[a (b:0.5]", [("a ", 1 / 1.1), ("b:0.5", 1 / 1.1 * 1.1)]),
        (r"[a\|b]", [("a|b", 1 / 1.1)]),
        (r"[a\:0.5]", [("a:0.5", 1 / 1.1)]),
        (r"(a\:0.5)", [("a:0.5", 1.1)]),
        (r"\<lora:x:1>", [("<lora:x:1>", 1.0)]),
        ("I <3 you, 1 < 2: 3 > 2", [("I <3 you, 1 < 2: 3 > 2", 1.0)]),
    ],
)  # fmt: skip
def test_weights(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = weights_of(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [["a"], ["b"]]),
        ("a\nBREAK\nb", [["a"], ["b"]]),
        ("BREAK a", [[], ["a"]]),
        ("a, BREAK , b", [["a,"], [", b"]]),
        ("a BREAK BREAK b", [["a"], [], ["b"]]),
        ("BREAKFAST break", [["BREAKFAST break"]]),
    ],
)
def test_break(prompt: str, expected: list[list[str]]) -> None:
    assert [[piece.text for piece in part] for part in parse_prompt(prompt)] == expected


def test_break_within_brackets() -> None:
    assert parse_prompt("(a BREAK b:1.5)") == [(Piece("a", 1.5),), (Piece("b", 1.5),)]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a [cat:dog:0.5] here", "[cat:dog:0.5]"),
        ("[cat:10]", "[cat:10]"),
        ("[:(cat:1.2):.5]", "[:(cat:1.2):.5]"),
        ("[cat::1e1 ]", "[cat::1e1 ]"),
        ("[[a:b]:0.5]", "[[a:b]:0.5]"),
        ("x [a|(b:2)|] y", "[a|(b:2)|]"),
        ("a <lora:style:0.8> b", "loras="),
        ("<LyCO:style>", "loras="),
        ("<hypernet:x:1>", "<hypernet:x:1>"),
        ("(word:1.2.3)", ":1.2.3)"),
        ("(wait:...)", ":...)"),
        ("(" * 9000 + "a", "weights"),
        (f"a (word:1{'0' * 30})", "'word' in the prompt gets the weight 1e+30: weights must be between -1000 and 1000"),
        ("((word:-40):30) b", "'word' in the prompt gets the weight -1200: weights"),
        ("a\ud800b", "character 2"),
        ("embedding:nothing", "embedding:nothing"),
    ],
)
def test_what_is_not_supported_is_refused(prompt: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_prompt(prompt)
    assert named in str(caught.value)
    if "\ud800" not in prompt:
        assert parse_prompt(prompt, syntax="literal") == [(Piece(prompt),)]


def test_and_is_a_word_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="AND"):
        assert weights_of("a cat AND a dog") == [("a cat AND a dog", 1.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_prompt("SAND and a cat And a dog")
        parse_prompt("a cat AND a dog", syntax="literal")


SYNTAX = st.lists(
    st.one_of(
        st.sampled_from([*r"()[]\:|<>,.", ":1.2)", ":0.5]", "BREAK", " ", "style", "embedding:", "<lora:a>", "cat"]),
        st.text(max_size=3),
    ),
    max_size=40,
).map("".join)
SPECIAL = r"\()[]:|<"


@given(SYNTAX)
def test_any_prompt_has_chunks_or_a_usage_error(prompt: str) -> None:
    try:
        chunks = explain_tokens(prompt, TOKENIZER, embeddings={"style": learnt("style")})
    except UsageError:
        return
    assert chunks
    for chunk in chunks:
        assert len(chunk.tokens) <= 75
        assert all(math.isfinite(token.weight) for token in chunk.tokens)


@given(st.text(st.characters(exclude_characters=SPECIAL, exclude_categories=["Cs"]), max_size=60))
def test_plain_text_has_weight_one(text: str) -> None:
    assert parse_prompt(text) == [(Piece(text),) if text else ()]
    assert list(chain(*ids_of(text))) == TOKENIZER.tokens(text)


@given(st.lists(st.sampled_from(["cat ", ", ", "the ", "1", "\N{CACTUS}"]), max_size=300).map("".join))
def test_chunks_hold_all_tokens_in_order(text: str) -> None:
    chunks = ids_of(text)
    assert list(chain(*chunks)) == TOKENIZER.tokens(text)
    assert all(55 < len(chunk) <= 75 for chunk in chunks[:-1])
    assert chunks == [[token.id for token in c.tokens] for c in explain_tokens(text, TOKENIZER, syntax="literal")]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (75, 0, [75]),
        (76, 0, [75, 1]),
        (55, 30, [56, 30]),  # the comma is the first of the last twenty tokens
        (54, 30, [75, 10]),  # one earlier, it is not
        (74, 30, [75, 30]),
        (75, 30, [75, 31]),  # a comma that does not fit moves on alone
    ],
)
def test_a_full_chunk_is_cut_after_a_near_comma(before: int, after: int, expected: list[int]) -> None:
    comma = "," if after else ""
    assert [len(chunk) for chunk in ids_of("cat " * before + comma + " dog" * after)] == expected


def test_a_comma_that_does_not_fit_cuts_nothing() -> None:
    assert [len(chunk) for chunk in ids_of("cat " * 60 + "," + " dog" * 14 + ", dog")] == [75, 2]
    assert [len(chunk) for chunk in ids_of("cat " * 60 + "," + " dog" * 14 + " dog")] == [61, 15]


def test_break_and_empty_prompts() -> None:
    cat, dog = TOKENIZER.tokens("cat dog")
    assert ids_of("") == [[]]
    assert ids_of("cat BREAK dog") == [[cat], [dog]]
    assert ids_of("BREAK cat BREAK BREAK dog BREAK") == [[], [cat], [], [dog]]


def test_tokens_are_explained() -> None:
    (chunk,) = explain_tokens("a (Fox:1.5), style", TOKENIZER, embeddings={"style": learnt("style")})
    found = [(token.text, token.weight, token.index) for token in chunk.tokens]
    assert found == [("a", 1.0, 0), ("Fox", 1.5, 0), (",", 1.0, 0), ("style", 1.0, 0), ("style", 1.0, 1)]
    (chunk,) = explain_tokens("Two  cafés, \N{CACTUS}", TOKENIZER)
    assert [token.text for token in chunk.tokens] == ["Two", "caf", "és", ",", "\N{CACTUS}"]


def test_a_learnt_words_vectors_stay_together() -> None:
    word = {"style": learnt("style", 10)}
    assert [len(chunk) for chunk in ids_of("cat " * 65 + "style", word)] == [75]
    assert [len(chunk) for chunk in ids_of("cat " * 66 + "style", word)] == [66, 10]
    assert [len(chunk) for chunk in ids_of("cat " * 60 + ", cat style style", word)] == [72, 10]
    assert [len(chunk) for chunk in ids_of("cat " * 62 + ", cat cat style dog", word)] == [63, 13]
    with pytest.raises(UsageError, match=r"style.*76 vectors"):
        ids_of("style", {"style": learnt("style", 76)})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo, style", ["style"]),
        ("(Style:1.2), STYLE's", ["Style", "STYLE"]),
        ("style.", ["style"]),
        ("styles, my_style, style2, style-3, re-style, v1.style", []),
        ("style-two", ["style-two"]),
        ("style three, style", ["style three", "style"]),
        ("big style", ["big style"]),
        ("<cat-toy> x", ["<cat-toy>"]),
        ("embedding:style, embedding:Style-Two.safetensors", ["embedding:style", "embedding:Style-Two.safetensors"]),
        ("style.pt", []),
        ("an embedding: a vector, myembedding:x", []),
    ],
)
def test_names_of_learnt_words(prompt: str, expected: list[str]) -> None:
    words = {name: learnt(name) for name in ("style", "style-two", "style three", "big style", "<cat-toy>")}
    (pieces,) = parse_prompt(prompt, embeddings=words)
    assert [piece.text for piece in pieces if piece.embedding is not None] == expected
    assert "".join(piece.text for piece in pieces) == prompt.replace("(", "").replace(":1.2)", "")
    for piece in pieces:
        if piece.embedding is not None:
            assert piece.embedding.name in piece.text.lower()
    assert parse_prompt(prompt, syntax="literal", embeddings=words) == [(Piece(prompt),)]


def test_unknown_and_ambiguous_names() -> None:
    with pytest.raises(UsageError, match=r"embedding:styles.*loaded: style"):
        parse_prompt("a, embedding:styles, b", embeddings={"style": learnt("style")})
    with pytest.raises(UsageError, match=r"Style, style"):
        parse_prompt("a", embeddings={"style": learnt("style"), "Style": learnt("Style")})


@pytest.mark.parametrize(
    ("encoder", "layers"),
    [
        ("clip-l", {1: -1, 2: -2, 12: -12}),
        ("openclip-h", {2: -1, 3: -2, 24: -23}),
        ("sdxl-clip-l", {1: -1, 2: -2, 12: -12}),
        ("bigg", {1: -1, 2: -2, 32: -32}),
    ],
)
def test_clip_skip_counts_layers_of_the_published_encoder(encoder: str, layers: dict[int, int]) -> None:
    config = TEXT_ENCODERS[encoder]
    assert {skip: hidden_layer(config, skip) for skip in layers} == layers
    assert hidden_layer(config, None) is None
    for wrong in (0, -1, max(layers) + 1, min(layers) - 1):
        with pytest.raises(UsageError, match="clip_skip"):
            hidden_layer(config, wrong)


Pipes = tuple[str, nativesd.Pipeline, diffusers.DiffusionPipeline]


@pytest.fixture(scope="module", params=FORMS)
def pipes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipes:
    """A small random model of each form, ours and diffusers', whose text encoders have no telling initial values.

    Their poolers look for the end-of-text token: the published configs' eos_token_id of 2 means the highest id, which
    is that of an added token.
    """
    folder = tmp_path_factory.mktemp("models") / request.param
    save_model(request.param, folder)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    for encoder in text_encoders(theirs):
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(folder)
    for encoder in text_encoders(theirs):
        body = getattr(encoder, "text_model", encoder)
        body.eos_token_id = 49407
        encoder.__dict__["text_model"] = body  # where diffusers 0.42 looks for the norm, and transformers 5 has it not
    return request.param, nativesd.load(folder, device="cpu"), theirs


def text_encoders(pipe: diffusers.DiffusionPipeline) -> list[transformers.PreTrainedModel]:
    return [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]


@torch.inference_mode()
def ours_of(pipe: nativesd.Pipeline, prompts: Sequence[str], **options: object) -> tuple[Tensor, Tensor]:
    return encode_prompts(prompts, pipe.text_encoders, pipe.tokenizers, device=CPU, **options)  # type: ignore[arg-type]


@torch.inference_mode()
def theirs_of(
    form: str, pipe: diffusers.DiffusionPipeline, prompt: str, clip_skip: int | None = None
) -> tuple[Tensor, Tensor | None]:
    found = pipe.encode_prompt(
        prompt, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False, clip_skip=clip_skip
    )
    return found[0], found[2] if form == "sdxl" else None


@pytest.mark.parametrize("clip_skip", [None, 2, 3])
def test_context_and_clip_skip(pipes: Pipes, clip_skip: int | None) -> None:
    """diffusers counts what is skipped beyond the family's own layer; ours is the layer, from the end."""
    form, ours, theirs = pipes
    offset = {"sd15": 1, "sd21-base": 2, "sdxl": 2}[form]
    prompt = "a red cat, sitting on 2 mats"
    context, pooled = ours_of(ours, [prompt], clip_skip=clip_skip)
    expected, expected_pooled = theirs_of(form, theirs, prompt, None if clip_skip is None else clip_skip - offset)
    assert difference(context, expected) <= TOLERANCE
    if expected_pooled is not None:
        assert difference(pooled, expected_pooled) <= TOLERANCE
    if clip_skip == 3:
        assert difference(context, ours_of(ours, [prompt])[0]) > TOLERANCE


@torch.inference_mode()
def plain(pipe: nativesd.Pipeline, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The encoders on the tokenizers' plain rows, without chunks or weights."""
    outputs = [
        encoder(torch.tensor(tokenizer.encode(prompts)))
        for encoder, tokenizer in zip(pipe.text_encoders, pipe.tokenizers, strict=True)
    ]
    return torch.cat([output.hidden for output in outputs], dim=-1), outputs[-1].pooled


def test_plain_prompts_are_bit_identical(pipes: Pipes) -> None:
    _, ours, _ = pipes
    prompts = ["a red cat, sitting", "", "two boats"]
    expected = plain(ours, prompts)
    for same in (prompts, ["a ((red:1.0) cat:1), sitting", "()", r"\two boats"]):
        assert all(map(torch.equal, ours_of(ours, same), expected))
    assert all(map(torch.equal, ours_of(ours, prompts, syntax="literal"), expected))
    odd = ["[a|b] (c:2) <lora:x:1>"]
    assert all(map(torch.equal, ours_of(ours, odd, syntax="literal"), plain(ours, odd)))


def test_chunks_are_encoded_on_their_own(pipes: Pipes) -> None:
    _, ours, _ = pipes
    first, second = "cat " * 74 + "cat", "a (dog:1.3)"
    context, pooled = ours_of(ours, [f"{first} {second}"])
    apart, pooled_apart = ours_of(ours, [first, second])
    assert context.shape[1] == 2 * 77
    assert difference(context, apart.flatten(0, 1)[None]) <= TOLERANCE
    assert difference(pooled, pooled_apart[:1]) <= TOLERANCE
    assert difference(context, ours_of(ours, [f"{first} BREAK {second}"])[0]) <= TOLERANCE


def test_weights_leave_the_other_prompts_alone(pipes: Pipes) -> None:
    _, ours, _ = pipes
    context, _ = ours_of(ours, ["a (red:1.5) cat", "two boats"])
    before = plain(ours, ["a red cat", "two boats"])[0]
    assert torch.equal(context[1], before[1])
    assert difference(context[0], before[0]) > TOLERANCE


def test_weights_scale_states_and_keep_the_mean(pipes: Pipes) -> None:
    """Each encoder's states on their own: A1111 has one mean per encoder."""
    _, ours, _ = pipes
    context, pooled = ours_of(ours, ["a (red:1.5) [cat]"])
    before, pooled_before = plain(ours, ["a red cat"])
    assert torch.equal(pooled, pooled_before)
    weights = torch.ones(77, 1)
    weights[2], weights[3] = 1.5, 1 / 1.1
    at = 0
    for encoder in ours.text_encoders:
        states = before[..., at : at + encoder.config.width]
        expected = states * weights
        expected = expected * (states.mean() / expected.mean())
        found = context[..., at : at + encoder.config.width]
        assert difference(found, expected) <= TOLERANCE
        assert found.mean().item() == pytest.approx(states.mean().item(), rel=1e-4)
        at += encoder.config.width


def test_a_mean_of_nothing_but_rounding_is_not_restored(tmp_path: Path) -> None:
    """Untrained norms make states of mean zero, and dividing what rounding leaves of it would give anything."""
    save_model("sd21-base", tmp_path)
    ours = nativesd.load(tmp_path, device="cpu")
    context, _ = ours_of(ours, ["a (red:1.5) cat"])
    weights = torch.ones(77, 1)
    weights[2] = 1.5
    expected = plain(ours, ["a red cat"])[0] * weights
    assert difference(context, expected) <= TOLERANCE


def test_means_that_cancel_are_not_restored() -> None:
    """A mean that is zero before or after weighting has no ratio that would keep the states."""

    class Ones(torch.nn.Module):
        config = TEXT_ENCODERS["clip-l"]
        token_embedding = torch.nn.Embedding(1, 1)

        def forward(self, tokens: Tensor, *, embedded: Tensor | None = None, hidden: int | None = None) -> TextOutput:
            states = torch.ones(*tokens.shape, 2)
            states[tokens == TOKENIZER.tokens("dog")[0]] = -76.0
            return TextOutput(states, states[:, 0])

    def states_of(prompt: str) -> list[float]:
        context, _ = encode_prompts([prompt], [Ones()], [TOKENIZER], device=CPU)
        return context[0, :3, 0].tolist()

    assert states_of("(cat:-76)") == [1.0, -76.0, 1.0]  # 76 of 77 states are 1
    assert states_of("(dog:0.5)") == [1.0, -38.0, 1.0]
    assert states_of("(cat:78)") == [0.5, 39.0, 0.5]


def test_a_batch_gives_what_its_prompts_give_alone(pipes: Pipes) -> None:
    """Through the UNet, as contexts of different lengths are repeated to a common one."""
    form, ours, _ = pipes
    prompts = ["a (red:1.5) cat", "a BREAK (dog:0.5) BREAK, on a mat", "x " * 100, "plain"]
    context, pooled = ours_of(ours, prompts)
    assert context.shape[1] == 6 * 77
    inputs = unet_inputs(ours.config.unet, 1, 8, 8, timestep=500.0)
    for i, prompt in enumerate(prompts):
        alone, pooled_alone = ours_of(ours, [prompt])
        assert difference(pooled[i : i + 1], pooled_alone) <= TOLERANCE
        results = [
            ours.unet(inputs.latents, 500.0, c, pooled=inputs.pooled, time_ids=inputs.time_ids).detach()
            for c in (context[i : i + 1].clone(), alone.clone())
        ]
        assert difference(*results) <= TOLERANCE, f"{form}: {prompt}"


def test_learnt_words_as_diffusers_has_them(pipes: Pipes, tmp_path: Path) -> None:
    form, ours, theirs = pipes
    widths = [encoder.config.width for encoder in ours.text_encoders]
    tensors = [vectors * 0.2 for vectors in learnt("lornwort", 3, *widths).vectors]
    keys = ["clip_l", "clip_g"] if form == "sdxl" else ["emb_params"]
    save_file(dict(zip(keys, tensors, strict=True)), tmp_path / "lornwort.safetensors")
    words = {"lornwort": read_embeddings(tmp_path / "lornwort.safetensors")[0]}
    tokenizers = [getattr(theirs, name) for name in ("tokenizer", "tokenizer_2") if hasattr(theirs, name)]
    prompt = "a red lornwort, sitting"
    without = theirs_of(form, theirs, prompt)[0]
    try:
        for vectors, encoder, tokenizer in zip(tensors, text_encoders(theirs), tokenizers, strict=True):
            theirs.load_textual_inversion(vectors, token="lornwort", text_encoder=encoder, tokenizer=tokenizer)
        expected, expected_pooled = theirs_of(form, theirs, prompt)
    finally:
        for encoder, tokenizer in zip(text_encoders(theirs), tokenizers, strict=True):
            theirs.unload_textual_inversion("lornwort", text_encoder=encoder, tokenizer=tokenizer)
    for same in (prompt, "a red Embedding:LORNWORT.pt, sitting"):
        context, pooled = ours_of(ours, [same, "a plain one"], embeddings=words)
        assert difference(context[:1], expected) <= TOLERANCE
        if expected_pooled is not None:
            assert difference(pooled[:1], expected_pooled) <= TOLERANCE
    assert difference(expected, without) > 1e-2
    assert torch.equal(ours_of(ours, [prompt], embeddings=words, syntax="literal")[0], plain(ours, [prompt])[0])


def test_learnt_words_of_another_model_are_refused(pipes: Pipes) -> None:
    _, ours, _ = pipes
    words = {"style": learnt("style", 1, 4096)}
    with pytest.raises(UsageError, match="4096"):
        ours_of(ours, ["a style"], embeddings=words)
    ours_of(ours, ["not named"], embeddings=words)


def test_the_encoder_takes_embeddings_and_exports_without_them() -> None:
    encoder, _ = text_pair(text_config("gelu", -2, True, 40))
    tokens = token_rows(0)
    with torch.inference_mode():
        expected = encoder(tokens)
        found = encoder(tokens, embedded=encoder.token_embedding(tokens), hidden=-2)
        other = encoder(tokens, embedded=torch.zeros(2, 77, 48))
    assert all(map(torch.equal, found, expected))
    assert difference(other.hidden, expected.hidden) > TOLERANCE
    with torch.no_grad():
        exported = torch.export.export(encoder, (tokens,)).module()(tokens)
    assert difference(exported.hidden, expected.hidden) <= TOLERANCE
    assert difference(exported.pooled, expected.pooled) <= TOLERANCE


def test_tokenizers_that_disagree_are_refused() -> None:
    pipe = nativesd.load(device="cpu")
    with pytest.raises(SourceError, match="tokenizers disagree"):
        encode_prompts(
            ["cat " * 60],
            pipe.text_encoders * 2,
            (pipe.tokenizers[0], ClipTokenizer(pad=0, length=50)),
            device=CPU,
        )


def test_weights_on_the_embedded_model() -> None:
    """A weighted colour: its token's state is scaled, all others alike, and the picture has more of it."""
    pipe = nativesd.load(device="cpu")
    before = ours_of(pipe, ["a fox on a green background"])[0]
    context = ours_of(pipe, ["a fox on a (green:1.4) background"])[0]
    ratios = (context / before)[0].median(dim=-1).values
    green = 1 + TOKENIZER.tokens("a fox on a green background").index(TOKENIZER.tokens("green")[0])
    others = torch.cat([ratios[:green], ratios[green + 1 :]])
    assert ratios[green] / others[0] == pytest.approx(1.4, rel=1e-4)
    assert others.max() - others.min() < 1e-5
    assert others[0] == pytest.approx(1.0, abs=0.05)
    with pytest.raises(UsageError, match="clip_skip=1"):
        ours_of(pipe, ["a fox"], clip_skip=1)


@pytest.mark.parametrize(
    "text",
    [
        " " * 100_000, "(" * 100_000, "(a" * 33_000 + ")" * 33_000, "([" * 40_000 + ")" * 20_000, ":" * 100_000,
        "<" * 100_000, "<a:" * 33_000, "[:" * 25_000 + "]" * 25_000, "[a:" + "1" * 90_000 + "x]", "BREAK " * 16_000,
        "x" * 100_000, "\0" * 100_000,
    ],
)  # fmt: skip
def test_no_prompt_takes_long(text: str) -> None:
    def parse() -> None:
        with suppress(UsageError):
            parse_prompt(text)

    assert seconds_of(parse, 5) < 5


def test_a_prompt_has_a_length() -> None:
    with pytest.raises(UsageError, match="has 100001 characters, over the 100000"):
        parse_prompt("x" * 100_001)
    with pytest.raises(UsageError, match="in the prompt changes between steps") as refused:
        parse_prompt("[" + "a" * 50_000 + ":0.5]")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("number", ["1e30", "-1e30", "1001"])
def test_a_weight_of_comfyui_that_is_too_large(number: str) -> None:
    with pytest.raises(
        UsageError, match=r"^'word' in the prompt gets the weight \S+: weights must be between -1000 and"
    ):
        parse_prompt(f"a (word:{number})", syntax="comfyui")
    [[_, piece]] = parse_prompt("a (word:1e3)", syntax="comfyui")
    assert piece.weight == 1000
    for syntax in ("ignore", "none", "literal"):
        assert parse_prompt("a (word:9999)", syntax=syntax)
