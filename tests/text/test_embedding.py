"""Files of learnt words: what the audit says of one is what the loader reads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import nativesd
from nativesd.errors import NativesdWarning, SourceError, UsageError
from nativesd.text.embedding import read_embeddings
from text.test_prompt import learnt

ROWS, WIDE = torch.randn(3, 768), torch.randn(3, 1280)
SD2 = torch.randn(2, 1024)
FORMS: dict[str, tuple[dict[str, Tensor], dict[str, tuple[Tensor, ...]], str]] = {
    "a1111": ({"emb_params": ROWS}, {"word": (ROWS,)}, "SD1.x"),
    "a1111, pickled names": ({"string_to_param.*": ROWS}, {"word": (ROWS,)}, "SD1.x"),
    "pickled, several words": (
        {"string_to_param.cat": ROWS, "string_to_param.dog": ROWS[:1]}, {"cat": (ROWS,), "dog": (ROWS[:1],)}, "SD1.x",
    ),
    "diffusers": ({"<cat-toy>": ROWS}, {"<cat-toy>": (ROWS,)}, "SD1.x"),
    "a vector": ({"<cat-toy>": ROWS[0]}, {"<cat-toy>": (ROWS[:1],)}, "SD1.x"),
    "several tokens": ({"<s0>": ROWS[0], "<s1>": ROWS[1]}, {"<s0>": (ROWS[:1],), "<s1>": (ROWS[1:2],)}, "SD1.x"),
    "several plain names": ({"cat": SD2, "dog": SD2[0]}, {"cat": (SD2,), "dog": (SD2[:1],)}, "SD2.x"),
    "any name": ({"model.weight": SD2}, {"word": (SD2,)}, "SD2.x"),
    "any name and width": ({"x": torch.ones(2, 48)}, {"word": (torch.ones(2, 48),)}, ""),
    "half": ({"emb_params": ROWS.half()}, {"word": (ROWS.half().float(),)}, "SD1.x"),
    "sdxl": ({"clip_g": WIDE, "clip_l": ROWS}, {"word": (ROWS, WIDE)}, "SDXL"),
    "sdxl of diffusers": ({"text_encoders_1": WIDE, "text_encoders_0": ROWS}, {"word": (ROWS, WIDE)}, "SDXL"),
    "sdxl, one encoder": ({"clip_g": WIDE}, {"word": (WIDE,)}, "SDXL, its second text encoder"),
    "onetrainer": (
        {"clip_l": ROWS, "clip_g": WIDE, "clip_l_out": ROWS, "clip_g_out": WIDE, "t5xxl": torch.ones(3, 4096)},
        {"word": (ROWS, WIDE)}, "SDXL",
    ),
    "in a lora": (
        {"bundle_emb.cat.clip_l": ROWS, "bundle_emb.cat.clip_g": WIDE, "bundle_emb.cat.clip_l_out": ROWS},
        {"cat": (ROWS, WIDE)}, "SDXL",
    ),
    "in a lora, a1111": ({"bundle_emb.a.b.string_to_param.*": ROWS}, {"a.b": (ROWS,)}, "SD1.x"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, tmp_path: Path) -> None:
    tensors, expected, family = FORMS[form]
    path = tmp_path / "word.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    found = {word.name: word.vectors for word in read_embeddings(path)}
    assert found.keys() == expected.keys()
    for name, vectors in expected.items():
        assert len(found[name]) == len(vectors)
        assert all(map(torch.equal, found[name], vectors))
    report = nativesd.audit(path)
    [component] = report.components
    said = {evidence.what: evidence.value for evidence in component.evidence}
    assert report.ok
    assert (component.name, component.family) == ("textual_inversion", family)
    assert said["word"] == ", ".join("the file's name" if name == "word" else name for name in expected)
    assert said["width"] == " + ".join(str(rows.shape[1]) for rows in next(iter(expected.values())))
    assert said["vectors"] == ", ".join(dict.fromkeys(str(len(rows[0])) for rows in expected.values()))


def test_a_name_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "word.safetensors"
    save_file({"<cat>": ROWS}, path)
    assert read_embeddings(str(path), " my word ")[0].name == "my word"
    with pytest.raises(UsageError, match="name"):
        read_embeddings(path, " ")
    save_file({"<a>": ROWS, "<b>": ROWS.clone()}, path)
    with pytest.raises(UsageError, match="holds 2 words, which have names of their own: <a>, <b>"):
        read_embeddings(path, "my word")


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({}, "none"),
        ({"clip_l": torch.zeros(1, 4), "x": torch.zeros(1, 4)}, "x: no name that rows of a learnt word have"),
        ({f"k{i}": torch.zeros(1) for i in range(9)}, r"k0 F32 \[1\], k1 .* and 5 more"),
        ({"a.weight": torch.zeros(768), "a.bias": torch.zeros(768)}, "is no textual inversion"),
        ({"x": torch.zeros(300, 768)}, r"x F32 \[300, 768\]"),
        ({"clip_l": torch.zeros(1, 4), "clip_g": torch.zeros(2, 4)}, r"1 \+ 2"),
        ({"clip_l": torch.zeros(1, 4), "text_encoders_0": torch.zeros(1, 4)}, "the same text encoder"),
        ({"x": torch.zeros(1, 2, 3)}, r"x F32 \[1, 2, 3\]"),
        ({"emb_params": torch.zeros(1, 2, 3)}, r"not F32 \[1, 2, 3\]"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, r"not I64 \[2, 4\]"),
        ({"x": torch.zeros(0, 4)}, r"x F32 \[0, 4\]"),
    ],
)
def test_files_that_are_no_learnt_word(tensors: dict[str, Tensor], named: str, tmp_path: Path) -> None:
    path = tmp_path / "word.safetensors"
    save_file(tensors, path)
    with pytest.raises(SourceError, match=named) as caught:
        read_embeddings(path)
    assert str(path) in str(caught.value)
    report = nativesd.audit(path)
    assert not (report.ok and report.components)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    save_file({"x": torch.full((1, 4), math.nan)}, tmp_path / "word.safetensors")
    with pytest.raises(SourceError, match="finite"):
        read_embeddings(tmp_path / "word.safetensors")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        read_embeddings(tmp_path / "word.pt")
    for name, said in (("word.pt", "none that torch.save wrote"), ("word.safetensors", "none that torch.save wrote")):
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
        with pytest.raises(SourceError, match=said):
            read_embeddings(tmp_path / name)


def test_the_two_files_of_sdxl(tmp_path: Path) -> None:
    """As diffusers' textual_inversion_sdxl.py writes them; in any order, and by any names."""
    first, second = tmp_path / "learned_embeds.safetensors", tmp_path / "learned_embeds_2.safetensors"
    save_file({"<cat>": ROWS}, first)
    save_file({"<cat>": WIDE}, second)
    for pair in ((first, second), (second, first)):
        [word] = read_embeddings(pair)
        assert word.name == "<cat>"
        assert all(map(torch.equal, word.vectors, (ROWS, WIDE)))
    save_file({"emb_params": ROWS}, first)
    save_file({"emb_params": WIDE}, second)
    assert [word.name for word in read_embeddings([first, second])] == ["learned_embeds"]
    save_file({"<a>": ROWS, "<b>": ROWS.clone()}, first)
    save_file({"<b>": WIDE[:1], "<a>": WIDE.clone()}, second)
    with pytest.raises(SourceError, match=r"different numbers of vectors of '<b>': 3 \+ 1"):
        read_embeddings([first, second])
    save_file({"<c>": WIDE}, second)
    with pytest.raises(UsageError, match="do not have the same words"):
        read_embeddings([first, second])
    with pytest.raises(UsageError, match="two halves"):
        read_embeddings([first, second, first])


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [("cat_clip_l", "cat_clip_g", "cat"), ("Cat-CLIP-L", "Cat-clipG", "Cat"), ("learned", "learned_2", "learned")],
)
def test_either_of_two_files_stands_for_both(first: str, second: str, name: str, tmp_path: Path) -> None:
    """Where their names belong together, and what is in them."""
    paths = [tmp_path / f"{each}.safetensors" for each in (first, second)]
    for path, rows in zip(paths, (ROWS, WIDE), strict=True):
        save_file({"emb_params": rows}, path)
    save_file({"emb_params": WIDE}, tmp_path / "dog_clip_g.safetensors")
    for path in paths:
        [word] = read_embeddings(path)
        assert word.name == name
        assert all(map(torch.equal, word.vectors, (ROWS, WIDE)))
    assert read_embeddings(paths[1], "mine")[0].name == "mine"
    assert read_embeddings(tmp_path / "dog_clip_g.safetensors")[0].widths == [1280]
    save_file({"emb_params": ROWS + 1}, paths[1])  # of SD1.x, another version
    assert [read_embeddings(path)[0].widths for path in paths] == [[768], [768]]
    save_file({"<cat>": WIDE}, paths[1])
    save_file({"<cat>": ROWS}, paths[0])
    assert [read_embeddings(path)[0].name for path in paths] == ["<cat>", "<cat>"]


def test_learnt_words_fit_by_width() -> None:
    sd1, sd2, sdxl = learnt("a", 1, 768), learnt("b", 1, 1024), learnt("c", 1, 768, 1280)
    assert sd1.fit([768]) == sd1.vectors
    assert sdxl.fit([768, 1280]) == sdxl.vectors
    assert sdxl.fit([1280]) == sdxl.vectors[1:]  # the refiner
    for word, widths in ((sd1, [1024]), (sd2, [768]), (sd1, [768, 1280]), (sdxl, [768]), (sdxl, [1280, 768])):
        with pytest.raises(UsageError) as caught:
            word.fit(widths)
        for width in (*widths, *(vectors.shape[1] for vectors in word.vectors)):
            assert str(width) in str(caught.value)
    with pytest.raises(UsageError, match="give it together with the file for the other one"):
        learnt("half", 1, 1280).fit([768, 1280])


def test_words_in_a_pipeline(tmp_path: Path) -> None:
    pipe = nativesd.load(device="cpu")
    [width] = [encoder.config.width for encoder in pipe.text_encoders]
    save_file({"<s0>": torch.ones(1, width), "<s1>": torch.zeros(1, width)}, tmp_path / "a.safetensors")
    assert pipe.load_embedding(tmp_path / "a.safetensors") == "<s0> <s1>"
    plain, named = (pipe.encode_prompt([text])[0] for text in ("a fox", "a <s0><s1> fox"))
    assert not torch.equal(plain, named)


def test_words_of_a_lora_answer_while_it_is_merged(tmp_path: Path) -> None:
    pipe = nativesd.load(device="cpu")
    [width] = [encoder.config.width for encoder in pipe.text_encoders]
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    target = pipe.unet.get_parameter("mid.attentions.0.blocks.0.attn1.to_q.weight")
    lora = {f"{key}.lora_down.weight": torch.zeros(1, target.shape[1]),
            f"{key}.lora_up.weight": torch.zeros(target.shape[0], 1)}  # fmt: skip
    path = tmp_path / "lora.safetensors"
    save_file({**lora, "bundle_emb.lornwort.emb_params": torch.ones(2, width)}, path)
    report = nativesd.audit(path)
    assert [component.name for component in report.components] == ["lora", "textual_inversion"]
    assert report.components[1].ok
    plain = pipe.encode_prompt(["a lornwort"])[0]
    pipe.set_loras([path])
    assert list(pipe.words) == ["lornwort"]
    assert not torch.equal(pipe.encode_prompt(["a lornwort"])[0], plain)
    pipe.set_loras([])
    assert torch.equal(pipe.encode_prompt(["a lornwort"])[0], plain)
    assert pipe.load_embedding(path) == "lornwort"
    save_file({**lora, "bundle_emb.lornwort.emb_params": torch.ones(2, 7)}, path)
    pipe = nativesd.load(device="cpu")
    with pytest.warns(NativesdWarning, match="are not used: the embedding 'lornwort' is 7 wide"):
        pipe.set_loras([path])
    assert not pipe.words
