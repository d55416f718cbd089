"""Exports from the command line and from Python: what is written, and what mistakes are answered with."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from tokenizers import Tokenizer

import nativesd
from conftest import Run
from nativesd.checkpoints import export
from nativesd.checkpoints.export import Static, export_onnx, export_tensorrt
from nativesd.checkpoints.manifest import scheduler_json
from nativesd.config import ControlNetConfig, Level, UNetConfig
from nativesd.diffusion.control import ControlModel
from nativesd.errors import NativesdError, UsageError
from nativesd.export import check, library
from nativesd.export.kept.entries import MANIFEST
from nativesd.export.kept.store import Store
from nativesd.models.build import build
from nativesd.sampling.published import EDM, SchedulerConfig
from nativesd.text.tokenizer import ClipTokenizer, pad_id


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the embedded model needs to make a picture of a prompt."""
    dest = tmp_path_factory.mktemp("onnx") / "graphs"
    names = ["text_encoder", "unet", "vae_decoder"]
    done = export_onnx("tiny", dest, components=names, slots=False, image_prompts=False)
    assert [each.name for each in done] == names
    assert all(each.path.is_file() and 0 < each.details["error"] <= 1e-5 for each in done)
    return dest


def test_files_have_the_published_folders_names(exported: Path) -> None:
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert files == {
        *(f"{name}/model.onnx{end}" for name in ("text_encoder", "unet", "vae_decoder") for end in ("", ".data")),
        *(f"tokenizer/{name}" for name in TOKENIZER),
        "scheduler/scheduler_config.json", "manifest.json",
    }  # fmt: skip
    metadata = {entry.key: entry.value for entry in onnx.load(exported / "vae_decoder" / "model.onnx").metadata_props}
    assert metadata["component"] == "vae_decoder"
    assert metadata["nativesd"] == nativesd.__version__
    assert metadata["source"] == "tiny"


TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def read_manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def test_the_manifest_says_what_the_files_are(exported: Path) -> None:
    manifest = read_manifest(exported)
    assert (manifest["schema"], manifest["nativesd"], manifest["model"]["family"]) == (1, nativesd.__version__, "sd2")
    others = [path for path in exported.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert manifest["files"] == {
        path.relative_to(exported).as_posix(): {
            "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
        }
        for path in others
    }  # fmt: skip
    types = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    for name, component in manifest["components"].items():
        graph = onnx.load(exported / component["file"], load_external_data=False).graph
        for said, there in ((component["inputs"], graph.input), (component["outputs"], graph.output)):
            assert said == [
                {
                    "name": value.name,
                    "shape": [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim],
                    "dtype": next(k for k, v in types.items() if v == value.type.tensor_type.elem_type),
                }
                for value in there
            ], name
    axes = {axis for each in manifest["components"].values() for slot in each["inputs"] for axis in slot["shape"]}
    assert {axis for axis in axes if isinstance(axis, str)} == set(manifest["axes"])


def test_the_folder_is_enough_for_another_runtime(exported: Path) -> None:
    """A picture by ONNX Runtime, tokenizers and NumPy, from what is in the folder: by DDIM, as that says."""
    manifest = read_manifest(exported)
    [text] = manifest["conditioning"]["encoder_hidden_states"]

    def run(name: str, **inputs: np.ndarray) -> list[np.ndarray]:
        component = manifest["components"][name]
        session = ort.InferenceSession(exported / component["file"], providers=["CPUExecutionProvider"])
        out: list[np.ndarray] = session.run([slot["name"] for slot in component["outputs"]], inputs)
        return out

    prompt, steps, scale = "a fox on a yellow background", 4, manifest["model"]["guidance_scale"]
    tokenizer = Tokenizer.from_file(str(exported / text["tokenizer"] / "tokenizer.json"))
    ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(["", prompt])])
    context = run(text["component"], input_ids=ids)[0][text["layer"]]
    scheduler = json.loads((exported / manifest["scheduler"]["file"]).read_text())
    assert (scheduler["_class_name"], scheduler["set_alpha_to_one"]) == ("DDIMScheduler", False)
    alphas = 1 / (1 + np.array(manifest["scheduler"]["sigmas"]) ** 2)
    side = manifest["model"]["size"] // manifest["vae"]["factor"]
    shape = (1, manifest["vae"]["latent_channels"], side, side)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(5)).numpy()
    stride = len(alphas) // steps
    assert manifest["prediction"] == "v"
    for step in range((steps - 1) * stride + scheduler["steps_offset"], 0, -stride):
        answer = run(
            "unet",
            sample=np.repeat(latents, 2, 0),
            timestep=np.full(2, step, np.float32),
            encoder_hidden_states=context,
        )[0]
        velocity = answer[:1] + scale * (answer[1:] - answer[:1])
        now, then = alphas[step], alphas[max(step - stride, 0)]
        clean = now**0.5 * latents - (1 - now) ** 0.5 * velocity
        noise = now**0.5 * velocity + (1 - now) ** 0.5 * latents
        latents = (then**0.5 * clean + (1 - then) ** 0.5 * noise).astype(np.float32)
    pixels = run("vae_decoder", latent_sample=latents / np.float32(manifest["vae"]["scaling_factor"]))[0]
    found = (np.clip(pixels[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1) * 255).round()
    expected = nativesd.load("tiny", device="cpu")(prompt, steps=steps, seed=5, sampler="DDIM").images[0]
    assert np.abs(found - np.asarray(expected, np.float32)).max() <= 1


@pytest.mark.parametrize("pad", [0, 49407])
def test_tokenizers_are_written_whole(pad: int, tmp_path: Path) -> None:
    """Rows of ids by `tokenizers` alone, by transformers, and by nativesd again."""
    from transformers import CLIPTokenizer

    ours, folder = ClipTokenizer(pad=pad), tmp_path / "tokenizer"
    ours.save(folder)
    prompts = ["", "A Fox,  on a yellow\nbackground", "fox " * 100]
    expected = ours.encode(prompts)
    assert [each.ids for each in Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(prompts)] == expected
    theirs = CLIPTokenizer.from_pretrained(folder)(prompts, padding="max_length", truncation=True)["input_ids"]
    assert theirs == expected
    assert ClipTokenizer(folder, pad=pad_id(folder, 1)).encode(prompts) == expected


@pytest.mark.parametrize(
    "config",
    [
        SchedulerConfig(),
        SchedulerConfig("EulerDiscreteScheduler", prediction="v", spacing="trailing", zero_snr=True),
        SchedulerConfig("PNDMScheduler", set_alpha_to_one=True, steps_offset=0),
        SchedulerConfig("DPMSolverMultistepScheduler[sde-dpmsolver++, order 3]", order=3, solver="heun",
                        euler_at_final=True, lower_order_final=False, final_sigma_zero=False, kind="karras"),
        SchedulerConfig("DPMSolverSinglestepScheduler", lower_order_final=False, kind="lu"),
        SchedulerConfig("EulerDiscreteScheduler", prediction="v", edm=EDM(largest=120.0, data=1.0, kind="exponential")),
        SchedulerConfig("DPMSolverMultistepScheduler", edm=EDM()),
        SchedulerConfig("LCMScheduler", prediction="sample", original_steps=100, timestep_scaling=5.0,
                        trained_betas=(0.1, 0.2), train_steps=2, beta_schedule="linear"),
    ],
    ids=lambda config: config.class_name,
)  # fmt: skip
def test_scheduler_configs_are_read_back(config: SchedulerConfig) -> None:
    assert SchedulerConfig.from_published(scheduler_json(config)) == config


def test_a_static_file_from_the_command_line(run: Run, tmp_path: Path) -> None:
    command = ["export", "onnx", "tiny", str(tmp_path / "out"), "--component", "vae_decoder"]
    done = run(*command, "--static", "64x48", "--batch", "1")
    assert done.returncode == 0, done.stderr
    path, _, error = done.stdout.strip().partition(", within ")
    assert float(error.removesuffix(" of PyTorch")) <= 1e-5
    graph = onnx.load(path, load_external_data=False).graph
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [1, 4, 12, 16]


UNET = ["onnx", "tiny", "out", "--component", "unet"]
VAE = ["onnx", "tiny", "out", "--component", "vae_decoder", "--component", "vae_encoder"]
MISTAKES = {
    "dest exists": (["onnx", "tiny", "."], 2, "exists"),
    "no such dtype": (["onnx", "tiny", "out", "--dtype", "int3"], 2, "int3"),
    "an odd size": (["onnx", "tiny", "out", "--static", "63x64"], 2, "multiples of 4,"),
    "no control": (["onnx", "tiny", "out", "--component", "controlnet"], 2, "nothing to export"),
    "no control beside the UNet": (
        [*UNET, "--component", "controlnet"], 2, "--component controlnet does nothing without --control"
    ),
    "no adapter beside the UNet": (
        [*UNET, "--component", "ip_adapter"], 2, "--component ip_adapter does nothing without --image-adapter"
    ),
    "a control beside the UNet": (
        [*UNET, "--control", "tiny"], 2, "--control does nothing without --component controlnet"
    ),
    "an encoder beside the UNet": (
        [*UNET, "--image-encoder", "x"], 2, "--image-encoder does nothing without --component image_encoder"
    ),
    **{
        f"{option[0]} of a VAE": ([*VAE, "--static", "64x64", *option], 2, f"{option[0]} does nothing without --comp")
        for option in (["--no-slots"], ["--image-prompts"], ["--no-image-prompts"], ["--names", "comfyui"],
                       ["--lora", "x.safetensors"], ["--chunks", "1"], ["--groups", "1"], ["--image-tokens", "4"],
                       ["--image-adapter", "x"])
    },
    "slots of a VAE": (
        ["tensorrt", "tiny", "--for", "sm120", "--component", "vae_decoder", "--stream", "2"], 2,
        "--stream does nothing without --component unet or --component controlnet",
    ),
    "a tolerance of nothing": ([*UNET, "--no-check", "--tolerance", "1"], 2, "leave out --no-check"),
    "image prompts of comfyui": (
        [*UNET, "--static", "64x64", "--groups", "2", "--names", "comfyui"], 2, "leave out --names comfyui"
    ),
    "an old opset": (["onnx", "tiny", "out", "--component", "vae_decoder", "--opset", "9"], 2, "18 is the lowest"),
    "a default that is said": ([*VAE, "--names", "nativesd", "--opset", "9"], 2, "18 is the lowest"),
    "a new opset": (["onnx", "tiny", "out", "--component", "vae_decoder", "--opset", "26"], 2, "25 the highest"),
    "no card": (["tensorrt", "tiny", "--for", "blackwell"], 2, "'blackwell' is not a compute capability"),
    "no model": (["onnx", "nowhere.safetensors", "out"], 3, "nowhere.safetensors"),
    "no GPU": (["tensorrt", "tiny"], 2, "--for sm120"),
    "no profile": (["tensorrt", "tiny", "--for", "sm120", "--profile", "big"], 2, "'big' is not a profile"),
}  # fmt: skip


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
    with pytest.raises(NativesdError, match=r"text_encoder is off from float32 by .*, and 1e-12 is the tolerance"):
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


def test_engines_for_cards_that_are_elsewhere(run: Run, tmp_path: Path) -> None:
    """What is there is left, what is missing is built, what a card cannot have is skipped: each with a word."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed", exc_type=ImportError)
    options: dict[str, Any] = {"profiles": ["64"], "components": ["vae_decoder"], "dtype": "bfloat16"}
    [done] = export_tensorrt("tiny", tmp_path, targets=["12.0"], **options)
    assert (done.target, done.state) == ("sm120", "built")
    assert done.path is not None
    assert (done.path / "model.engine").stat().st_size > 1e6
    assert done.details["onnx"]["error"] <= 5e-3
    assert done.details["source"] == "tiny"
    assert [slot["name"] for slot in (*done.details["inputs"], *done.details["outputs"])] == ["latent_sample", "sample"]
    command = [
        "export", "tensorrt", "tiny", "--engines", str(tmp_path), "--profile", "64", "--component", "vae_decoder",
        "--dtype", "bfloat16",
    ]  # fmt: skip
    done = run(*command, "--for", "sm75,sm_86,SM120")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[1]: line for line in done.stderr.splitlines() if line.startswith("vae_decoder")}
    assert "skipped" in rows["sm75"]
    assert "no products in bfloat16 for sm75" in rows["sm75"]
    assert "built" in rows["sm86"]
    assert "engine not run here; graph within" in rows["sm86"]
    assert "there" in rows["sm120"]
    assert "nativesd: vae_decoder (1 of 1)" in done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert [path.name.split("__")[5] for path in paths] == ["sm86", "sm120"]
    assert sorted(path for path in tmp_path.iterdir() if path.is_dir()) == sorted(paths)  # no graph is left


def test_a_controlnet_of_another_family_is_refused(tmp_path: Path) -> None:
    config = UNetConfig((Level(32, (1,), (), 2), Level(32, (None,), (), 2)), mid=(1, None), context=8, groups=8)
    module = build(ControlNetConfig(config, hint_widths=(4, 8)))
    pipe = nativesd.load("tiny", device="cpu")
    pipe.load_control = lambda source: ControlModel("other", module)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="other is a ControlNet of another family"):
        export._parts(pipe, ["controlnet"], ["other"])


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
        ("load('tiny', device='cpu', backend='onnx')", ["onnx_ir is not installed", 'pip install ".[onnx]"']),
        (
            "load('tiny', device='cpu', backend='openvino')",
            ["onnx_ir is not installed", 'pip install ".[onnx]"'],
        ),
        ("load('tiny', device='cpu', backend='cudagraphs')", ["CUDA graphs run on a GPU, and the model is on cpu"]),
        ("export_onnx('tiny', 'out')", ["onnx_ir is not installed", 'pip install ".[onnx]"']),
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
