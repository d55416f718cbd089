"""Transformers traced once per kind: a UNet repeats a few of them, and they are most of an export's time.

While the whole is traced every one is an operator, `nativesd::transformer`, which only says that its shape stays. Then
each kind is traced by itself, as a function of its inputs and weights, and put in place of the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch.export import Dim

from nativesd.models.layers import Attention, SpatialTransformer

DOMAIN = "nativesd"
Convert = Callable[[torch.export.ExportedProgram], ir.Model]
"""Translates a traced program to ONNX."""


def _operator(x: Tensor, context: Tensor, *, index: int) -> Tensor:
    """What a transformer is while the whole is traced."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::transformer", (x, context), {"index": index}, dtype=x.dtype, shape=x.shape, version=1
    )


@dataclass(frozen=True)
class Transformer:
    """One transformer of a module."""

    name: str
    module: SpatialTransformer

    @property
    def kind(self) -> tuple[tuple[int, ...], ...]:
        """What those that have the same graph have in common: heads and shapes."""
        heads = tuple(part.heads for part in self.module.modules() if isinstance(part, Attention))
        return (heads, *(tuple(tensor.shape) for tensor in self.module.state_dict().values()))


@contextmanager
def as_operators(module: nn.Module) -> Iterator[list[Transformer]]:
    """Within, the transformers of `module` are operators, numbered as in the list."""
    found = [Transformer(name, part) for name, part in module.named_modules() if isinstance(part, SpatialTransformer)]
    try:
        for index, transformer in enumerate(found):
            transformer.module.forward = partial(_operator, index=index)  # type: ignore[method-assign]
        yield found
    finally:
        for transformer in found:
            transformer.module.__dict__.pop("forward", None)


def insert(model: ir.Model, transformers: list[Transformer], convert: Convert, context: Tensor) -> None:
    """Put the transformers' graphs in place of their operators.

    convert  as the whole was; context  an example of the transformers' second input
    """
    kinds: dict[tuple[tuple[int, ...], ...], ir.Model] = {}
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        transformer = transformers[node.attributes["index"].as_int()]
        if transformer.kind not in kinds:
            kinds[transformer.kind] = convert(_trace(transformer.module, context))
        graph = kinds[transformer.kind].graph
        _insert(model, node, transformer, graph, f"transformer_{list(kinds).index(transformer.kind)}")
    InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)


class _Function(nn.Module):
    """A transformer as a function of its weights too: so none of them becomes, changed, a constant of its graph."""

    def __init__(self, module: SpatialTransformer) -> None:
        super().__init__()
        self.called = (module,)  # not a submodule, whose parameters would be constants

    def forward(self, x: Tensor, context: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """(B, C, H, W), (B, S, context width) and the state -> (B, C, H, W)."""
        out: Tensor = torch.func.functional_call(self.called[0], weights, (x, context))
        return out


def _trace(module: SpatialTransformer, context: Tensor) -> torch.export.ExportedProgram:
    """With any batch, sides, and number of tokens."""
    x = torch.zeros(context.shape[0], module.norm.num_channels, 7, 5, dtype=context.dtype)
    state, auto = module.state_dict(), Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto}, {0: auto, 1: auto}, dict.fromkeys(state))
    return torch.export.export(_Function(module), (x, context, state), dynamic_shapes=shapes, strict=False)


def _insert(model: ir.Model, node: ir.Node, transformer: Transformer, graph: ir.Graph, name: str) -> None:
    """A call of the transformer's function, `name`, in place of its operator."""
    state = transformer.module.state_dict()
    if (DOMAIN, name, "") not in model.functions:
        for value in (value for inner in graph for value in inner.outputs):
            value.shape = None  # in symbols of this trace, which mean something else in the whole
        graph.inputs.extend(graph.initializers.values())
        graph.initializers.clear()
        model.functions[DOMAIN, name, ""] = ir.Function(DOMAIN, name, graph=graph, attributes=())
    weights = [_initializer(model, f"{transformer.name}.{key}", TorchTensor(tensor)) for key, tensor in state.items()]
    constants = [
        _initializer(model, f"{name}.{value.name}", value.const_value)
        for value in model.functions[DOMAIN, name, ""].inputs[2 + len(state) :]
    ]
    call = ir.Node(DOMAIN, name, [*node.inputs, *weights, *constants], num_outputs=1, name=transformer.name)
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [call], node.outputs, call.outputs)


def _initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol | None) -> ir.Value:
    """A weight, or a number that the tracer put in a graph."""
    assert tensor is not None  # of an initializer
    if name not in model.graph.initializers:
        shape = ir.Shape(tuple(tensor.shape.numpy()))
        value = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
        model.graph.register_initializer(value)
    return model.graph.initializers[name]
