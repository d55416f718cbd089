"""Sources: variants, shards, dtypes, memory, tokenizers, the hub through a local server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import nativesd
from nativesd.errors import SourceError, WeightsError
from nativesd.shipped import TINY
from nativesd.text.tokenizer import DEFAULT, ClipTokenizer
from nativesd.weights.files import tensors as reading
from nativesd.weights.files.source import open_source

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(TINY, copy)
    return copy


def shard(folder: Path) -> None:
    """Split the UNet into two shards and an index."""
    tensors = load_file(folder / UNET)
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for i, half in enumerate(halves, 1):
        file = f"diffusion_pytorch_model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / "unet" / file)
        weight_map |= dict.fromkeys(half, file)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / UNET).unlink()


def test_shards_and_variants_load_the_same(folder: Path) -> None:
    expected = nativesd.load(device="cpu").unet.state_dict()
    shard(folder)
    text = folder / "text_encoder"
    (text / "model.safetensors").rename(text / "model.fp16.safetensors")
    found = nativesd.load(folder, device="cpu").unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"00002-of-00002\.safetensors, which is missing"):
        nativesd.load(folder, device="cpu")


def test_a_shard_outside_the_folder_is_refused(folder: Path) -> None:
    shard(folder)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(SourceError, match="outside its folder"):
        nativesd.load(folder, device="cpu")


def test_a_file_is_read_by_its_first_bytes_not_by_its_name(folder: Path) -> None:
    expected = nativesd.load(folder, device="cpu").unet.conv_in.weight.clone()
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    assert torch.equal(nativesd.load(folder, device="cpu").unet.conv_in.weight, expected)


def test_every_fault_is_named(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    del tensors["conv_in.bias"]
    tensors["conv_out.bias"] = torch.zeros(5)
    tensors["mid_block.surprise"] = torch.zeros(1)
    save_file(tensors, folder / UNET)
    with pytest.raises(WeightsError) as caught:
        nativesd.load(folder, device="cpu")
    message = str(caught.value)
    assert "missing conv_in.bias: expected as conv_in.bias" in message
    assert "unexpected mid_block.surprise: no rule names it" in message
    assert "wrong shape conv_out.bias: the model takes [4], conv_out.bias has [5]" in message
    assert message.count("\n") == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype: str) -> None:
    pipe = nativesd.load(device="cpu", dtype=dtype)
    for module in (pipe.unet, pipe.vae, *pipe.text_encoders):
        assert {p.dtype for p in module.parameters()} == {getattr(torch, dtype)}
        assert not any(p.requires_grad for p in module.parameters())
    if dtype == "bfloat16":
        result = pipe("a fox on a green background", steps=2, seed=1)
        assert result.latents.isfinite().all()


@pytest.mark.parametrize("piece", [2, 1000, 4 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_that_are_cast_in_pieces_are_those_of_the_file(
    piece: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any size: the last one of a tensor is smaller."""
    monkeypatch.setattr(reading, "PIECE", piece)
    stored = torch.randn(37, 41, generator=torch.Generator().manual_seed(0)).half()
    tensors = {"first": stored[:3].clone(), "second": stored, "none": stored[:0].clone(), "one": stored[0, 0].clone()}
    save_file(tensors, tmp_path / "some.safetensors")
    (member,) = open_source(tmp_path / "some.safetensors")
    memory = torch.full((stored.nbytes,), 255, dtype=torch.uint8)
    with (tmp_path / "some.safetensors").open("rb") as file:
        for key, tensor in tensors.items():
            found = reading.read_as(dtype, memory, member, key, file)
            assert found.dtype == dtype
            assert torch.equal(found, tensor.to(dtype))


def test_an_overflowing_vae_is_said_and_mended() -> None:
    pipe = nativesd.load(device="cpu", dtype="float16")
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight *= 60000
    latents = torch.randn(1, 4, 16, 16)
    with pytest.warns(UserWarning, match="overflowed"):
        images = pipe.decode(latents)
    assert images[0].size == (64, 64)
    assert pipe.vae.quant_conv.weight.dtype == torch.float32


MEMORY = """
import resource, sys, torch, nativesd
from nativesd.models.build import build
from nativesd.weights.checkpoint import fill
from nativesd.weights.identity.identify import identify_all
from nativesd.weights.maps.keymap import load_tables
from nativesd.weights.files.source import open_source
from pathlib import Path
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon")) * 1024
folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
[(member, identity)] = identify_all(open_source(folder), load_tables())
[component] = identity.components
unet = build(component.config)
before = anonymous()
fill(unet, member, component, device=torch.device("cpu"), dtype=dtype)
print((anonymous() - before) / sum(p.numel() * p.element_size() for p in unet.parameters()))
"""


@pytest.mark.parametrize(("dtype", "low", "high"), [("float16", 0.0, 0.15), ("float32", 0.8, 1.15)])
def test_one_copy_of_the_weights(dtype: str, low: float, high: float) -> None:
    """Mapped where the dtype fits, so nearly nothing anonymous; one copy where it is cast."""
    command = [sys.executable, "-c", MEMORY, str(TINY / "unet"), dtype]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert low <= ratio <= high


PROMPTS = ["a cat", "", "Hello,  WORLD's 12 cafés", "naïve 東京 🌵 emoji", "x " * 100]


@pytest.mark.parametrize(("pad", "number"), [("<|endoftext|>", 49407), ("<|startoftext|>", 49406)])
def test_tokens_are_those_of_transformers(pad: str, number: int) -> None:
    theirs = transformers.CLIPTokenizer.from_pretrained(DEFAULT, pad_token=pad)
    expected = theirs(PROMPTS, padding="max_length", max_length=77, truncation=True).input_ids
    assert ClipTokenizer(pad=number).encode(PROMPTS) == expected


def test_a_models_own_tokenizer_wins(folder: Path) -> None:
    own = folder / "tokenizer"
    transformers.CLIPTokenizer.from_pretrained(own).save_pretrained(folder / "saved")
    for name in ("vocab.json", "merges.txt"):
        (own / name).unlink()
    shutil.copy(folder / "saved" / "tokenizer.json", own / "tokenizer.json")
    (own / "special_tokens_map.json").write_text('{"pad_token": {"content": "cat</w>"}}')
    (tokenizer,) = nativesd.load(folder, device="cpu").tokenizers
    assert tokenizer.encode(["a cat"])[0][:6] == [49406, 320, 2368, 49407, 2368, 2368]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client needs for one model, and the requests that were made."""

    requests: list[str] = []  # noqa: RUF012 - one server per test

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.requests.append(self.path)
        path = self.path.partition("?")[0]
        files = sorted(str(p.relative_to(TINY)) for p in TINY.rglob("*") if p.is_file())
        if "gated" in path:
            return self.reply(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        if "broken" in path:
            return self.reply(500, b"{}", body, {})
        if "someone/tiny" not in path:
            return self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if "/resolve/" in path:
            name = path.split("/resolve/")[1].partition("/")[2]
            if not (TINY / name).is_file():
                return self.reply(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})
            data = (TINY / name).read_bytes()
            etag = hashlib.sha1(data).hexdigest()
            return self.reply(200, data, body, {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40})
        if "/tree/" in path:
            tree = [{"type": "file", "path": f, "size": (TINY / f).stat().st_size, "oid": "0" * 40} for f in files]
            return self.reply(200, json.dumps(tree).encode(), body, {})
        info = {"id": "someone/tiny", "modelId": "someone/tiny", "sha": "c" * 40, "private": False, "tags": [],
                "downloads": 0, "likes": 0, "siblings": [{"rfilename": f} for f in files]}  # fmt: skip
        return self.reply(200, json.dumps(info).encode(), body, {})

    def reply(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def hub_run(
    endpoint: str, cache: Path, *arguments: str, command: str = "generate", **environment: str
) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-c", "from nativesd.cli import run; run()", command]
    if command == "generate":
        script += ["a fox", "--steps", "1", "-o", str(cache / "fox.png")]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    return subprocess.run(
        [*script, *arguments],
        env=inherited | environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_hub_then_cache_without_a_request(hub: str, tmp_path: Path) -> None:
    first = hub_run(hub, tmp_path, "--model", "someone/tiny")
    assert first.returncode == 0, first.stderr
    assert Hub.requests
    Hub.requests.clear()
    second = hub_run(hub, tmp_path, "--model", "someone/tiny")
    assert second.returncode == 0, second.stderr
    assert Hub.requests == []
    assert hub_run(hub, tmp_path, "--model", "someone/tiny", HF_HUB_OFFLINE="1").returncode == 0


@pytest.mark.parametrize(
    ("model", "environment", "words"),
    [
        ("nobody/nothing", {}, "nobody/nothing is not on the hub"),
        ("someone/gated", {}, "gated"),
        ("someone/broken", {}, "500"),
        ("someone/tiny", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ("someone/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_network_mistakes(hub: str, tmp_path: Path, model: str, environment: dict[str, str], words: str) -> None:
    done = hub_run(hub, tmp_path, "--model", model, **environment)
    assert done.returncode == 4, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_audit_of_a_hub_model_fetches_no_weights(hub: str, tmp_path: Path) -> None:
    done = hub_run(hub, tmp_path, "someone/tiny", command="audit")
    assert done.returncode == 0, done.stderr
    assert "unet (SD2.x of its own form, diffusers): 326 of 326 mapped" in done.stdout
    assert not list(tmp_path.rglob("*.safetensors"))
    one = hub_run(hub, tmp_path, "someone/tiny/vae/diffusion_pytorch_model.safetensors", command="audit")
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("vae ")
    url = f"{hub}/someone/tiny/resolve/main/vae/diffusion_pytorch_model.safetensors"
    assert hub_run(hub, tmp_path, url, command="audit").stdout.startswith("vae ")


@pytest.mark.parametrize("source", ["nobody/nothing", "someone/tiny/nothing.safetensors", "http://127.0.0.1:9/x"])
def test_audit_of_what_the_hub_does_not_have(hub: str, tmp_path: Path, source: str) -> None:
    done = hub_run(hub, tmp_path, source, command="audit")
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", None])
def test_a_safety_checker_is_ignored(folder: Path, weights: str | None) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    if weights is not None:
        save_file({"special_care_embeds": torch.zeros(3, 8)}, folder / "safety_checker" / weights)
    assert nativesd.load(folder, device="cpu").config.family == "sd2"
    report = nativesd.audit(folder)
    assert report.ok
    ignored = {i.key for c in report.components for i in c.ignored}
    assert ignored == ({"special_care_embeds"} if weights == "model.safetensors" else set())


def test_an_option_takes_its_own_kind_only(folder: Path, tmp_path: Path) -> None:
    """A whole model named for its VAE lends the VAE, and nothing else; the same for its text encoders."""
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        file = other / f"{part}.safetensors"
        save_file({name: tensor * 0.5 for name, tensor in load_file(file).items()}, file)

    def parts(**options: str) -> tuple[float, float]:
        pipe = nativesd.load(folder, device="cpu", fast=False, **options)  # type: ignore[arg-type]
        return float(pipe.vae.quant_conv.weight.norm()), float(pipe.text_encoders[0].token_embedding.weight.norm())

    vae, text = parts()
    assert parts(vae=str(other)) == pytest.approx((vae / 2, text), rel=1e-3)
    assert parts(text_encoders=[str(other)]) == pytest.approx((vae, text / 2), rel=1e-3)  # type: ignore[arg-type]


def test_an_option_that_finds_nothing_of_its_kind_says_so(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"has no vae, so vae= cannot take one from it \(found: text_encoder\)"):
        nativesd.load(folder, vae=folder / "text_encoder")
