"""Exported graphs by ONNX Runtime and by OpenVINO."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nativesd.errors import SourceError, UsageError, install_line
from nativesd.export.graphs import DTYPES
from nativesd.export.slots import Request, Schema, Slot

NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}
TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
"""The dtypes that are run here, by what ONNX Runtime calls them."""
_CLOSED = "this {} graph was closed: load it again"


@dataclass(frozen=True)
class Value:
    """What a file says of an input or output: its dtype's name, and its sides, None where any will do."""

    dtype: str
    sides: tuple[int | None, ...]


class ZeroSlots:
    """The inputs of one call after another: what is given, checked, and zeros for control slots that are not.

    The zeros stay the same tensors as long as the request does, and are never ones that a caller has given.
    """

    def __init__(self, schema: Schema, dtype: torch.dtype, device: torch.device) -> None:
        self.schema = schema
        self.dtype = dtype
        self.device = device
        self._zeros: dict[str, Tensor] = {}

    def kind(self, slot: Slot) -> torch.dtype:
        """The dtype of a slot's tensors."""
        return DTYPES.get(slot.kind, self.dtype)

    def complete(self, given: Mapping[str, Tensor]) -> tuple[Request, dict[str, Tensor]]:
        """The request, and every input of the schema, contiguous and of its dtype, on the device.

        Raises UsageError where shapes do not fit each other, or an input is missing or unknown.
        """
        known = {slot.name for slot in self.schema.inputs}
        if unknown := given.keys() - known:
            raise UsageError(f"{self.schema.component}: there is no input {', '.join(sorted(unknown))}")
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        request = self.schema.given(given.keys()).request(shapes)
        out = {}
        for slot in self.schema.inputs:
            if slot.name in given:
                out[slot.name] = given[slot.name].to(self.device, self.kind(slot)).contiguous()
                continue
            zeros, shape = self._zeros.get(slot.name), slot.shape(request)
            if zeros is None or tuple(zeros.shape) != shape:
                zeros = self._zeros[slot.name] = torch.zeros(shape, dtype=self.kind(slot), device=self.device)
            out[slot.name] = zeros
        return request, out

    def release(self) -> int:
        """Let the zeros go; returns their bytes."""
        size = sum(zeros.nbytes for zeros in self._zeros.values())
        self._zeros.clear()
        return size


class OnnxRunner:
    """A graph in ONNX Runtime, on the CPU or, with onnxruntime-gpu, on CUDA; tensors are bound where they are."""

    def __init__(self, path: Path, schema: Schema, dtype: torch.dtype, device: torch.device) -> None:
        """Raises UsageError where the runtime is missing or does not compute in `dtype`, SourceError for a bad file."""
        ort = backend("onnxruntime", "onnx")
        if dtype not in NUMPY:
            raise UsageError(f"ONNX Runtime does not compute in {dtype}: load with dtype='float32' or 'float16'")
        place = {"device_id": str(device.index or 0)} if device.type == "cuda" else {}
        provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
        if provider not in ort.get_available_providers():
            raise UsageError("this onnxruntime has no CUDA provider: pip install onnxruntime-gpu, or use device='cpu'")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self.session: Any = ort.InferenceSession(str(path), options, providers=[(provider, place)])
        except Exception as error:  # the runtime has no base class of its own that is public
            raise SourceError(f"ONNX Runtime cannot read {path}: {str(error).splitlines()[0]}") from error
        self.schema = schema
        self.device = device
        self._inputs = ZeroSlots(schema, dtype, device)
        self._values = {
            value.name: Value(TYPES.get(value.type, value.type), _sides(value.shape))
            for value in (*self.session.get_inputs(), *self.session.get_outputs())
        }
        _check_file(path, schema, dtype, self.session.get_modelmeta().custom_metadata_map.get("schema"), self._values)

    def refusal(self, request: Request) -> str | None:
        """See `Runner`."""
        return _unfit(self.schema, self._values, request)

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Runner`."""
        if self.session is None:
            raise UsageError(_CLOSED.format(self.schema.component))
        request, inputs = self._inputs.complete(given)
        _require_fit(self, request)
        binding, place = self.session.io_binding(), (self.device.type, self.device.index or 0)
        for slot in self.schema.inputs:
            tensor = inputs[slot.name]
            binding.bind_input(slot.name, *place, NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        out = {}
        for slot in self.schema.outputs:
            dtype = self._inputs.kind(slot)
            tensor = out[slot.name] = torch.empty(slot.shape(request), dtype=dtype, device=self.device)
            binding.bind_output(slot.name, *place, NUMPY[dtype], tuple(tensor.shape), tensor.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the session has a stream of its own
        self.session.run_with_iobinding(binding)
        return out

    def close(self) -> int:
        """See `Runner`; ONNX Runtime does not say how much its session held, so only the zeros are counted."""
        self.session = None
        return self._inputs.release()


class OpenVinoRunner:
    """A graph in OpenVINO on the CPU, which can compute in a lower precision than the file's."""

    def __init__(self, path: Path, schema: Schema, dtype: torch.dtype, precision: torch.dtype) -> None:
        """`dtype` is the file's, `precision` what is computed in.

        Raises UsageError where OpenVINO is missing, SourceError for what it cannot read.
        """
        openvino = backend("openvino", "openvino")
        hint = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[precision]
        core = openvino.Core()
        try:
            model = core.read_model(str(path))
            digest = model.get_rt_info(["framework", "schema"]).astype(str) if _has_schema(model) else None
            self._values = {
                value.get_any_name(): Value(
                    np.dtype(value.element_type.to_dtype()).name,
                    tuple(side.get_length() if side.is_static else None for side in value.partial_shape),
                )
                for value in (*model.inputs, *model.outputs)
            }
            options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            self._request: Any = core.compile_model(model, "CPU", options).create_infer_request()
        except RuntimeError as error:
            raise SourceError(f"OpenVINO cannot read {path}: {str(error).strip().splitlines()[-1]}") from error
        self.schema = schema
        self._inputs = ZeroSlots(schema, dtype, torch.device("cpu"))
        _check_file(path, schema, dtype, digest, self._values)

    def refusal(self, request: Request) -> str | None:
        """See `Runner`."""
        return _unfit(self.schema, self._values, request)

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Runner`."""
        if self._request is None:
            raise UsageError(_CLOSED.format(self.schema.component))
        request, inputs = self._inputs.complete(given)
        _require_fit(self, request)
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        results = self._request.infer(arrays, share_inputs=True)
        named = {key.get_any_name(): array for key, array in results.items()}
        return {slot.name: torch.from_numpy(named[slot.name]) for slot in self.schema.outputs}

    def close(self) -> int:
        """See `Runner`; only the zeros are counted."""
        self._request = None
        return self._inputs.release()


def backend(module: str, extra: str) -> Any:
    """A package that an extra brings. Raises UsageError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{module} is not installed ({error}): {install_line(extra)}") from error


def _has_schema(model: Any) -> bool:
    return bool(model.has_rt_info(["framework", "schema"]))


def _sides(shape: Sequence[int | str]) -> tuple[int | None, ...]:
    return tuple(side if isinstance(side, int) else None for side in shape)


def _check_file(
    path: Path, schema: Schema, dtype: torch.dtype, digest: str | None, values: Mapping[str, Value]
) -> None:
    if digest != schema.digest:
        raise SourceError(f"{path} is not a graph of this {schema.component}: its inputs are others; export it again")
    wanted = str(dtype).removeprefix("torch.")
    for slot in (*schema.inputs, *schema.outputs):
        if slot.kind == "weights" and values[slot.name].dtype != wanted:
            raise SourceError(f"{path} computes in {values[slot.name].dtype}, not in {wanted}: export it again")


def _unfit(schema: Schema, values: Mapping[str, Value], request: Request) -> str | None:
    """Why a graph of one size cannot serve a request."""
    for slot in schema.inputs:
        fixed, wanted = values[slot.name].sides, slot.shape(request)
        if any(side not in (None, size) for side, size in zip(fixed, wanted, strict=True)):
            return f"this graph was exported for {slot.name} of shape {fixed} alone, and {request} needs {wanted}"
    return None


def _require_fit(runner: OnnxRunner | OpenVinoRunner, request: Request) -> None:
    if refusal := runner.refusal(request):
        raise UsageError(f"{runner.schema.component}: {refusal}")
