"""Exports from the command line and from Python: what is written, and what mistakes are answered with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

import nativesd
from conftest import Run
from nativesd.checkpoints.export import Static, export_onnx, export_tensorrt
from nativesd.errors import NativesdError, UsageError
from nativesd.export import check, library
from nativesd.export.store import MANIFEST, Store


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's text encoder and VAE decoder."""
    dest = tmp_path_factory.mktemp("onnx") / "graphs"
    done = export_onnx("tiny", dest, components=["text_encoder", "vae_decoder"])
    assert [each.name for each in done] == ["text_encoder", "vae_decoder"]
    assert all(each.path.is_file() and 0 < each.details["error"] <= 1e-5 for each in done)
    return dest


def test_files_have_the_published_folders_names(exported: Path) -> None:
    assert sorted(path.relative_to(exported).as_posix() for path in exported.rglob("*.onnx*")) == [
        "text_encoder/model.onnx",
        "text_encoder/model.onnx.data",
        "vae_decoder/model.onnx",
        "vae_decoder/model.onnx.data",
    ]
    metadata = {entry.key: entry.value for entry in onnx.load(exported / "vae_decoder" / "model.onnx").metadata_props}
    assert metadata["component"] == "vae_decoder"
    assert metadata["nativesd"] == nativesd.__version__
    assert metadata["source"] == "tiny"


def test_a_static_file_from_the_command_line(run: Run, tmp_path: Path) -> None:
    command = ["export", "onnx", "tiny", str(tmp_path / "out"), "--component", "vae_decoder"]
    done = run(*command, "--static", "64x48", "--batch", "1")
    assert done.returncode == 0, done.stderr
    path, _, error = done.stdout.strip().partition(", within ")
    assert float(error.removesuffix(" of PyTorch")) <= 1e-5
    graph = onnx.load(path, load_external_data=False).graph
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [1, 4, 12, 16]


MISTAKES = {
    "dest exists": (["onnx", "tiny", "."], 2, "exists"),
    "no such dtype": (["onnx", "tiny", "out", "--dtype", "int3"], 2, "int3"),
    "an odd size": (["onnx", "tiny", "out", "--static", "63x64"], 2, "multiples of 4,"),
    "no control": (["onnx", "tiny", "out", "--component", "controlnet"], 2, "nothing to export"),
    "an old opset": (["onnx", "tiny", "out", "--component", "vae_decoder", "--opset", "9"], 2, "18 is the lowest"),
    "no model": (["onnx", "nowhere.safetensors", "out"], 3, "nowhere.safetensors"),
    "no GPU": (["tensorrt", "tiny"], 2, "--for sm120"),
    "no profile": (["tensorrt", "tiny", "--for", "sm120", "--profile", "big"], 2, "'big' is not a profile"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, run: Run, tmp_path: Path) -> None:
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    arguments, expected, sentence = MISTAKES[case]
    done = run("export", *arguments)
    assert (done.returncode, done.stdout) == (expected, "")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_computes_something_else_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(check.TOLERANCES, torch.float32, 1e-12)
    with pytest.raises(NativesdError, match=r"text_encoder is off by .*, and 1e-12 is the tolerance for float32"):
        export_onnx("tiny", tmp_path / "out", components=["text_encoder"])
    assert list(tmp_path.iterdir()) == []


def test_unknown_components_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no component decoder: there are text_encoder"):
        export_onnx("tiny", tmp_path / "out", components=["decoder"])
    with pytest.raises(UsageError, match="sides must be multiples of 8,"):
        Static(512, 500).request(8)


def test_weights_have_a_hash() -> None:
    """Of names, dtypes and values."""
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert library.weights_hash(first) != library.weights_hash(second)
    second.load_state_dict(first.state_dict())
    assert library.weights_hash(first) == library.weights_hash(second) != library.weights_hash(second.half())
    assert len(library.weights_hash(first)) == 16


def test_the_folder_of_engines(run: Run, tmp_path: Path) -> None:
    """Listed, found damaged, pruned."""
    pipe = nativesd.load("tiny", device="cpu")
    part = library.Part("vae_decoder", "vae_decoder", pipe.vae, pipe.config.family)
    entry = library.onnx_entry(part, Store(tmp_path))
    assert json.loads((entry.path / MANIFEST).read_text())["details"]["error"] <= 1e-5
    done = run("engines", "verify", "--engines", str(tmp_path))
    assert done.returncode == 0
    assert "vae_decoder" in done.stdout
    assert "sound" in done.stdout
    again = library.onnx_entry(part, Store(tmp_path))
    assert again == entry  # found, not exported again
    with (entry.path / "model.onnx.data").open("ab") as file:
        file.write(b"more")
    with pytest.raises(NativesdError, match=r"is damaged .*engines prune"):
        library.onnx_entry(part, Store(tmp_path))
    done = run("engines", "list", "--engines", str(tmp_path))
    assert done.returncode == 1
    assert "was written with" in done.stdout
    done = run("engines", "prune", "--engines", str(tmp_path), "--dry-run")
    assert (done.returncode, entry.path.is_dir()) == (0, True)
    assert done.stdout.startswith("would remove")
    run("engines", "prune", "--engines", str(tmp_path))
    assert not entry.path.exists()


def test_engines_for_a_card_that_is_elsewhere(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed", exc_type=ImportError)
    [done] = export_tensorrt("tiny", tmp_path, targets=["sm120"], profiles=["64"], components=["vae_decoder"])
    assert (done.path / "model.engine").stat().st_size > 1e6
    assert done.details["onnx"]["error"] <= 5e-3
    done = run(
        "export", "tensorrt", "tiny", "--engines", str(tmp_path), "--for", "sm120", "--profile", "64",
        "--component", "vae_decoder",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "is there already" in done.stderr


MISSING = """
import sys
for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"):
    sys.modules[name] = None
import nativesd
from nativesd.errors import UsageError
try:
    nativesd.{call}
except UsageError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("call", "sentences"),
    [
        ("load('tiny', device='cpu', backend='onnx')", ["onnx_ir is not installed", 'pip install "nativesd[onnx]"']),
        (
            "load('tiny', device='cpu', backend='openvino')",
            ["onnx_ir is not installed", 'pip install "nativesd[onnx]"'],
        ),
        ("load('tiny', device='cpu', backend='cudagraphs')", ["CUDA graphs run on a GPU, and the model is on cpu"]),
        ("export_onnx('tiny', 'out')", ["onnx_ir is not installed", 'pip install "nativesd[onnx]"']),
        ("export_tensorrt('tiny', targets=['sm120'])", ["TensorRT-RTX is not installed: pip install"]),
    ],
)
def test_what_the_package_alone_does_not_bring_is_named(call: str, sentences: list[str], tmp_path: Path) -> None:
    """In a process where none of the extras can be imported."""
    done = subprocess.run(
        [sys.executable, "-c", MISSING.format(call=call)], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(nativesd.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(sentence in done.stdout for sentence in sentences)
