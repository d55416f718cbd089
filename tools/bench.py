"""nativesd against diffusers, OpenVINO and ONNX Runtime on the same random weights, in turns, in one process.

    python tools/bench.py [--case NAME]... [--peer NAME]... [--threads N] [--clock cpu] [--json FILE] [--plot FILE]

Prints a table. On a machine with other work, `--threads 1 --clock cpu` measures what other processes take no part in.
`--plot` needs matplotlib. A case holds one set of weights, and a copy of them for each of OpenVINO and ONNX Runtime.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from nativesd.cli.common import print_tables
from nativesd.cli.machine import timing_table
from nativesd.config import UNetConfig
from nativesd.machine.bench import (
    CASES,
    Case,
    Inputs,
    draw,
    empty_module,
    machine,
    make_inputs,
    measure,
    native_ways,
)
from nativesd.machine.timing import CLOCKS, Report, Way

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oracles import published_unet, published_vae, share

BASE = "diffusers"


class Plain(nn.Module):
    """diffusers' module as a function from tensors to a tensor."""

    def __init__(self, reference: nn.Module, case: Case) -> None:
        super().__init__()
        self.reference = reference
        self.part = case.part

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | None = None,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """The prediction, or the picture."""
        if self.part == "vae":
            decoded: Tensor = self.reference.decode(latents, return_dict=False)[0]
            return decoded
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        out: Tensor = self.reference(latents, timestep, context, added_cond_kwargs=added, return_dict=False)[0]
        return out


def arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    """What `Plain` takes."""
    if not isinstance(inputs.context, Tensor):
        return (inputs.latents,)
    timestep = torch.tensor([inputs.timestep], device=inputs.latents.device).expand(inputs.latents.shape[0])
    tensors = (inputs.latents, timestep, inputs.context, inputs.pooled, inputs.time_ids)
    return tuple(tensor for tensor in tensors if tensor is not None)


def openvino_way(plain: Plain, inputs: Inputs) -> Way:
    """OpenVINO, in the case's precision."""
    import openvino

    tensors = arguments(inputs)
    with torch.no_grad():
        converted = openvino.convert_model(plain, example_input=tensors)
    for port, tensor in zip(converted.inputs, tensors, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(list(tensor.shape)))
    converted.validate_nodes_and_infer_types()
    hint = "bf16" if inputs.latents.dtype == torch.bfloat16 else "f32"
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    for i, tensor in enumerate(tensors):
        request.set_input_tensor(i, openvino_tensor(tensor, converted.input(i)))
    return cast(Way, request.infer)


def openvino_tensor(tensor: Tensor, port: Any) -> Any:
    """A torch tensor for OpenVINO; numpy has no bfloat16, so that goes through its bits."""
    import openvino

    if tensor.dtype == torch.bfloat16:
        bits = tensor.contiguous().view(torch.int16).numpy()
        return openvino.Tensor(bits, list(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(tensor.contiguous().numpy().astype(port.get_element_type().to_dtype()))


def onnxruntime_way(plain: Plain, inputs: Inputs) -> Way:
    """ONNX Runtime on the CPU, float32 only."""
    import onnxruntime

    tensors = arguments(inputs)
    names = [f"x{i}" for i in range(len(tensors))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with torch.no_grad():
            torch.onnx.export(plain, tensors, path, input_names=names, dynamo=True, external_data=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {port.name: np.asarray(tensor) for port, tensor in zip(session.get_inputs(), tensors, strict=True)}
    return lambda: session.run(None, given)


def peer_ways(plain: Plain, inputs: Inputs, peers: list[str]) -> dict[str, Way]:
    """Those of `peers` that are installed and take the dtype; the others are said on stderr."""
    tensors = arguments(inputs)
    make: dict[str, Callable[[], Way]] = {
        "diffusers": lambda: partial(plain, *tensors),
        "compile": lambda: partial(torch.compile(plain), *tensors),
        "openvino": lambda: openvino_way(plain, inputs),
        "onnxruntime": lambda: onnxruntime_way(plain, inputs),
    }
    ways = {}
    for name in peers:
        if name == "onnxruntime" and inputs.latents.dtype != torch.float32:
            print(f"{name}: left out, it computes in float32 only on a CPU", file=sys.stderr)
            continue
        try:
            ways[name] = make[name]()
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
    return ways


def all_ways(case: Case, device: torch.device, peers: list[str]) -> dict[str, Way]:
    """Ours and the peers', on the same tensors."""
    with torch.device("meta"):
        config = case.config
        reference = published_unet(config) if isinstance(config, UNetConfig) else published_vae(config)
    reference.to(case.dtype).eval()
    draw(reference, device)
    ours = empty_module(case)
    share(reference, ours, f"{case.part}.diffusers")
    inputs = make_inputs(case, device)
    return peer_ways(Plain(reference, case), inputs, peers) | native_ways(
        ours, case, inputs, compiled="compile" in peers
    )


def plot(report: Report, path: Path) -> None:
    """Bars of the medians relative to diffusers', or in seconds where diffusers was left out."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(timing.case for timing in report.timings))
    figure = Figure(figsize=(8, 1 + 0.28 * len(report.timings)), layout="constrained")
    axes = figure.subplots(len(cases), squeeze=False)[:, 0]
    for axis, case in zip(axes, cases, strict=True):
        timings = [timing for timing in report.timings if timing.case == case][::-1]
        ratios = [report.ratio(timing, BASE) for timing in timings]
        lengths = [t.median if math.isnan(ratio) else ratio for t, ratio in zip(timings, ratios, strict=True)]
        bars = axis.barh([timing.way for timing in timings], lengths)
        axis.bar_label(bars, [f"{length:.2f}" for length in lengths], padding=3)
        axis.set_title(f"{case}, {'seconds' if math.isnan(ratios[0]) else f'times {BASE}'}", fontsize="medium")
        axis.margins(x=0.1)
    figure.savefig(path, dpi=150)


def main() -> int:
    """The command line."""
    peers = ("diffusers", "compile", "openvino", "onnxruntime")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME", help=f"of: {', '.join(CASES)}")
    parser.add_argument("--peer", action="append", choices=peers, help="default: diffusers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: seconds of all threads of this process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=2, help="calls in a row, every turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", FutureWarning)
    device = torch.device(options.device)
    report = Report(machine(device, options.clock))
    for name in options.case or CASES:
        ways = all_ways(CASES[name], device, options.peer or [BASE])
        report.timings += measure(
            CASES[name], ways, device, rounds=options.rounds, repeat=options.repeat, clock=options.clock
        )
        del ways
        gc.collect()
        if options.json:
            options.json.write_text(json.dumps(report.fields(), indent=1))
    print_tables(timing_table(report, BASE))
    if options.plot:
        plot(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
