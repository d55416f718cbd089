"""A UNet's step in 8 bits against bfloat16, ours and OpenVINO's, on the same random weights, in turns, in one process.

    python tools/bench_quantised.py [--case NAME] [--peer openvino] [--peer openvino-int8] [--threads N] [--rounds N]

Prints a table: the medians of a step in seconds on the wall and of the processor (of all threads), the bytes of the
weights, and the error of the step, by float32 with the same weights, or with `--reference bfloat16` by ours in bfloat16
(SDXL in float32 takes 10 GB). OpenVINO's int8 is NNCF's post-training quantisation (`pip install nncf`), calibrated on
steps with small latents. Each peer holds a copy of the weights in float32 while it is made.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import Plain, arguments
from nativesd.config import UNetConfig
from nativesd.machine.bench import CASES, Case, Inputs, as_guided, call, draw, empty_module, make_inputs, twin
from nativesd.tuning.int8 import use_int8
from nativesd.tuning.tune import EVERYTHING, tune
from oracles import published_unet, share

CALIBRATED = 16
"""The side of the latents that NNCF sees."""


@dataclass
class Way:
    """One way to make the step."""

    run: Callable[[], Tensor]
    bytes: int
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    error: float = 0.0


def bytes_of(module: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def ours(plain: Any, case: Case, inputs: Inputs) -> dict[str, Way]:
    """The fast path in bfloat16, and the same in 8 bits."""
    other, eight, guided = twin(plain, case), twin(plain, case), as_guided(inputs)
    tune(other)
    use_int8(eight)
    ways = {"nativesd": Way(lambda: call(other, guided), bytes_of(plain))}
    ways["nativesd int8"] = Way(lambda: call(eight, guided), bytes_of(eight))
    tune(eight, EVERYTHING)
    return ways


def converted(reference: nn.Module, case: Case, inputs: Inputs) -> Any:
    """OpenVINO's form of diffusers' UNet, with weights in float32."""
    import openvino

    tensors = [tensor.float() for tensor in arguments(inputs)]
    with torch.no_grad():
        return openvino.convert_model(Plain(reference.float(), case), example_input=tuple(tensors))


def with_side(model: Any, inputs: Inputs, side: int) -> list[Any]:
    """Have a model take latents of a side; returns what it is given then, as numpy arrays."""
    tensors = arguments(replace(inputs, latents=inputs.latents[..., :side, :side]))
    model.reshape({port: list(tensor.shape) for port, tensor in zip(model.inputs, tensors, strict=True)})
    return [tensor.float().numpy() for tensor in tensors]


def openvino_way(model: Any, inputs: Inputs, side: int) -> Way:
    """A model of OpenVINO's, compiled for bfloat16 where its nodes leave that open."""
    import openvino

    given = with_side(model, inputs, side)
    weights = sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run() -> Tensor:
        out = request.infer(given, share_inputs=True)
        return torch.from_numpy(np.array(next(iter(out.values()))))

    return Way(run, weights)


def quantised(model: Any, inputs: Inputs) -> Any:
    """NNCF's post-training quantisation, calibrated on one step.

    Its corrections of biases and its smoothing change the numbers and not the time, and take many minutes.
    """
    import nncf

    given = with_side(model, inputs, CALIBRATED)
    unsmoothed = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    return nncf.quantize(
        model,
        nncf.Dataset([given]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=1,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            disable_bias_correction=True, smooth_quant_alphas=unsmoothed
        ),
    )


def difference(found: Tensor, exact: Tensor) -> float:
    """In the Frobenius norm, relative."""
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, case in CASES.items() if case.part == "unet" and case.dtype == torch.bfloat16]
    parser.add_argument("--case", choices=names, default="unet sd21 64x64 bf16", metavar="NAME", help=", ".join(names))
    parser.add_argument("--peer", action="append", choices=("openvino", "openvino-int8"), default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reference", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    case, device = CASES[options.case], torch.device("cpu")
    assert isinstance(case.config, UNetConfig)
    plain, inputs, published = empty_module(case), make_inputs(case, device), None
    if options.peer:
        with torch.device("meta"):
            published = published_unet(case.config)
        published.to(case.dtype).eval()
        draw(published, device)
        share(published, plain, "unet.diffusers")
    else:
        draw(plain, device)
    with torch.inference_mode():
        if options.reference == "float32":
            exact = call(empty_float(plain, case), as_float(inputs))
            gc.collect()
        ways = ours(plain, case, inputs)
        if options.reference == "bfloat16":
            exact = ways["nativesd"].run()
    del plain  # the ways have what they need of it
    if published is not None:
        model = converted(published, case, inputs)
        if "openvino-int8" in options.peer:
            ways["openvino int8"] = openvino_way(quantised(model, inputs), inputs, case.side)
            gc.collect()
        if "openvino" in options.peer:
            ways["openvino"] = openvino_way(model, inputs, case.side)
        del model
        del published
    gc.collect()
    with torch.inference_mode():
        for way in ways.values():
            way.error = difference(way.run(), exact)
        for _ in range(options.rounds):
            for way in ways.values():
                wall, processor = time.perf_counter(), time.process_time()
                way.run()
                way.wall.append(time.perf_counter() - wall)
                way.processor.append(time.process_time() - processor)
    print(f"{case.name}, {options.threads} threads, medians of {options.rounds}; error by {options.reference}")
    base = ways["nativesd"]
    for name, way in ways.items():
        wall, processor = statistics.median(way.wall), statistics.median(way.processor)
        ratios = [wall / statistics.median(base.wall), processor / statistics.median(base.processor)]
        print(
            f"{name:14} {wall:7.2f} s ({ratios[0]:.2f})  processor {processor:7.2f} s ({ratios[1]:.2f})  least "
            f"{min(way.wall):6.2f} s  weights {way.bytes / 1e9:.3f} GB  error {way.error:.2%}"
        )
    return 0


def empty_float(plain: Any, case: Case) -> Any:
    """The module in float32, with weights of its own."""
    other = twin(plain, case)
    return other.float()


def as_float(inputs: Inputs) -> Inputs:
    """The same inputs in float32."""
    tensors = {
        name: getattr(inputs, name).float()
        for name in ("latents", "context", "pooled", "time_ids")
        if getattr(inputs, name) is not None
    }
    return replace(inputs, **tensors)


if __name__ == "__main__":
    sys.exit(main())
