"""A picture from an exported folder, without nativesd and torch: own_loop.py FOLDER PROMPT OUT.png [EDGES.png]"""

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

SEED, NEGATIVE, LOW, AXES = 3, "", 0xFFFFFFFF, ("batch", "channels", "h", "w", "groups", "image_tokens")
session = functools.cache(onnxruntime.InferenceSession)


def randn(seed, shape):
    """Normal noise as an NVIDIA card draws it: Philox-4x32-10, a counter for every number; Box and Muller's sine."""
    c = np.arange(math.prod(shape), dtype=np.uint64)
    a, b, d, low, high = c * 0, c * 0, c * 0, seed & LOW, seed >> 32
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ low, q & LOW, (p >> 32) ^ d ^ high, p & LOW
        low, high = (low + 0x9E3779B9) & LOW, (high + 0xBB67AE85) & LOW
    u, v = a * 2.0**-32 + 2.0**-33, b * 2.0**-32 + 2.0**-33
    return (np.sqrt(-2 * np.log(u)) * np.sin(2 * np.pi * v)).astype(np.float32).reshape(shape)


def run(folder, graph, **given):
    """A graph's outputs by name. What takes control and image prompts is zeros where it is not given."""
    for slot in graph["inputs"]:
        if slot["name"] not in given and {"without_control", "without_image_prompts"} & slot.keys():
            sides = (str(side).removeprefix("ceil(").rstrip(")").partition("/") for side in slot["shape"])
            named = dict(zip(AXES, (*given["sample"].shape, 1, 1), strict=True))
            given[slot["name"]] = np.zeros([-(-int(named.get(a, a)) // int(n or 1)) for a, _, n in sides])
    inputs = {slot["name"]: np.asarray(given[slot["name"]], slot["dtype"]) for slot in graph["inputs"]}
    outputs = session(folder / graph["file"]).run(None, inputs)
    return {slot["name"]: np.float32(output) for slot, output in zip(graph["outputs"], outputs, strict=True)}


def main(folder, prompt, out, hint=None):
    """Paint `prompt` and write the picture to `out`."""
    manifest = json.loads((folder / "manifest.json").read_text())
    model, graphs, asked, vae = (manifest[name] for name in ("model", "components", "conditioning", "vae"))
    size, steps, sigmas, states = model["size"], model["steps"], manifest["scheduler"]["sigmas"], []
    for part in asked["encoder_hidden_states"]:  # SDXL has two encoders, whose states lie side by side
        tokenizer = Tokenizer.from_file(str(folder / part["tokenizer"] / "tokenizer.json"))  # pads and cuts to 77
        ids = [tokenizer.encode(text).ids for text in (NEGATIVE, prompt)]
        encoded = run(folder, graphs[part["component"]], input_ids=ids)
        states.append(encoded["hidden_states"][part["layer"]])
    told = {"encoder_hidden_states": np.concatenate(states, axis=-1), "text_embeds": encoded["pooled"]}
    if asked["zeros_for_empty_negative"] and NEGATIVE == "":
        told = {name: value * np.array([0, 1]).reshape(2, *[1] * (value.ndim - 1)) for name, value in told.items()}
    told["time_ids"] = [[size, size, 0, 0, size, size]] * 2  # like text_embeds, of SDXL
    if hint is not None:
        pixels = np.asarray(Image.open(hint).convert("RGB"), np.float32) / 255
        told["controlnet_cond"] = np.stack([pixels.transpose(2, 0, 1)] * 2)  # (H, W, 3) -> (2, 3, H, W)
    scheduler = json.loads((folder / manifest["scheduler"]["file"]).read_text())
    times = [i * (len(sigmas) // steps) + scheduler["steps_offset"] for i in reversed(range(steps))]
    path = [*(sigmas[time] for time in times), 0.0 if scheduler["set_alpha_to_one"] else sigmas[0]]
    x = randn(SEED, (1, vae["latent_channels"], *[size // vae["factor"]] * 2)) * math.hypot(1, path[0])
    for time, sigma, sigma_next in zip(times, path, path[1:], strict=False):
        norm = math.hypot(1, sigma)
        told |= {"sample": np.repeat(x / norm, 2, axis=0), "timestep": [time] * 2}
        if hint is not None:  # control_00 goes to input_control_00, and so on
            told |= {f"input_{name}": each for name, each in run(folder, graphs["controlnet"], **told).items()}
        negative, positive = np.split(run(folder, graphs["unet"], **told)["out_sample"], 2)
        answer = negative + model["guidance_scale"] * (positive - negative)
        velocity = manifest["prediction"] == "v"
        clean = x / (1 + sigma**2) - answer * (sigma / norm) if velocity else x - answer * sigma
        x = clean + (x - clean) * (sigma_next / sigma)  # DDIM's step
    x = x / math.hypot(1, path[-1]) / vae["scaling_factor"]
    pixels = run(folder, graphs["vae_decoder"], latent_sample=x)["sample"][0].transpose(1, 2, 0) / 2 + 0.5  # (H, W, 3)
    Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)).save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
