"""Blocks traced once per kind: networks repeat a few of them, and they are most of an export's time.

While the whole is traced every one is an operator, `nativesd::block`, which only says what shape comes out. Then each
kind is traced by itself, as a function of its inputs and weights, and put in place of the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch.export import Dim

from nativesd.models.layers import Attention, ResnetBlock, SpatialTransformer, TransformerBlock

DOMAIN = "nativesd"
BATCH, TOKENS, SIDES, GROUPS, IMAGE_TOKENS = 2, 77, (7, 5), 3, 20  # of the examples, which mean any
Convert = Callable[[torch.export.ExportedProgram], ir.Model]
"""Translates a traced program to ONNX."""


@dataclass(frozen=True)
class Block:
    """A residual block or a transformer of a module."""

    name: str
    module: ResnetBlock | SpatialTransformer
    images: bool = False
    """Whether image prompts are among a transformer's inputs."""

    @property
    def width(self) -> int:
        """Channels that come out."""
        return self.module.conv2.out_channels if isinstance(self.module, ResnetBlock) else self.module.norm.num_channels

    @property
    def kind(self) -> tuple[object, ...]:
        """What those that have the same graph have in common.

        In a transformer's the numbers of channels are written, to tell its heads apart. A residual block's has weights
        of any shape, as it has group norms that are one node (from opset 21 on).
        """
        if isinstance(self.module, ResnetBlock):
            norm = self.module.norm1
            return (norm.num_groups, norm.eps, *self.module.state_dict())
        heads = tuple(part.heads for part in self.module.modules() if isinstance(part, Attention))
        return (heads, *(tuple(tensor.shape) for tensor in self.module.state_dict().values()))

    def examples(self) -> tuple[tuple[Tensor, ...], tuple[dict[int, object], ...]]:
        """Inputs beside the weights, and their dynamic axes: any batch, sides, and number of tokens."""
        norm = self.module.norm1 if isinstance(self.module, ResnetBlock) else self.module.norm
        dtype, auto = norm.weight.dtype, Dim.AUTO
        shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((BATCH, norm.num_channels, *SIDES), (0, 2, 3))]
        if isinstance(self.module, SpatialTransformer):
            width = cast(TransformerBlock, self.module.blocks[0]).attn2.to_k.in_features
            shapes.append(((BATCH, TOKENS, width), (0, 1)))
            if self.images:
                shown = (BATCH, GROUPS, IMAGE_TOKENS)
                keys = (len(self.module.blocks), *shown, self.width)
                shapes += [(keys, (1, 2, 3)), (keys, (1, 2, 3)), (shown, (0, 1, 2))]
                shapes.append(((BATCH, GROUPS, *SIDES), (0, 1, 2, 3)))
        elif self.module.time_emb_proj is not None:
            shapes.append(((BATCH, self.module.time_emb_proj.in_features), (0,)))
        tensors = tuple(torch.zeros(shape, dtype=dtype) for shape, _ in shapes)
        return tensors, tuple(dict.fromkeys(axes, auto) for _, axes in shapes)


def _operator(*inputs: Tensor, index: int, width: int) -> Tensor:
    """What a block is while the whole is traced."""
    x = inputs[0]
    shape = (x.shape[0], width, *x.shape[2:])
    return torch.onnx.ops.symbolic(f"{DOMAIN}::block", inputs, {"index": index}, dtype=x.dtype, shape=shape, version=1)


@contextmanager
def as_operators(module: nn.Module, *, residual: bool, images: bool = False) -> Iterator[list[Block]]:
    """Within, the transformers of `module` are operators, numbered as in the list; `residual` blocks too if so asked.

    images  the transformers take image prompts

    Those have to have group norms that are one node. Transformers without blocks, as small SDXL ControlNets have, are
    left as they are.
    """
    found = [
        Block(name, part, images)
        for name, part in module.named_modules()
        if (isinstance(part, SpatialTransformer) and len(part.blocks)) or (isinstance(part, ResnetBlock) and residual)
    ]
    try:
        for index, block in enumerate(found):
            block.module.forward = partial(_operator, index=index, width=block.width)  # type: ignore[method-assign]
        yield found
    finally:
        for block in found:
            block.module.__dict__.pop("forward", None)


def insert(model: ir.Model, blocks: list[Block], convert: Convert) -> None:
    """Put the blocks' graphs in place of their operators; `convert` as the whole was."""
    calls = [(node, blocks[node.attributes["index"].as_int()]) for node in model.graph if node.domain == DOMAIN]
    kinds: dict[tuple[object, ...], Block] = {}
    for _, block in calls:
        kinds.setdefault(block.kind, block)
    functions = dict(zip(kinds, _functions(list(kinds.values()), convert), strict=True))
    for function in functions.values():
        model.functions[function.identifier()] = function
    for node, block in calls:
        _call(model, node, block, functions[block.kind])
    InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)


class _Functions(nn.Module):
    """Blocks as functions of their weights too: so none of them becomes, changed, a constant of a graph."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.called = tuple(block.module for block in blocks)  # not submodules, whose parameters would be constants

    def forward(self, *calls: tuple[tuple[Tensor, ...], dict[str, Tensor]]) -> list[Tensor]:
        """For every block its inputs and its state -> (B, C, H, W) of every block."""
        return [
            torch.func.functional_call(module, weights, inputs)
            for module, (inputs, weights) in zip(self.called, calls, strict=True)
        ]


def _functions(blocks: list[Block], convert: Convert) -> list[ir.Function]:
    """The graphs of blocks, each a function of its inputs, its state and its constants; all by one trace."""
    examples, states = [block.examples() for block in blocks], [block.module.state_dict() for block in blocks]
    inputs = tuple((tensors, state) for (tensors, _), state in zip(examples, states, strict=True))
    shapes = (tuple((axes, dict.fromkeys(state)) for (_, axes), state in zip(examples, states, strict=True)),)
    traced = convert(torch.export.export(_Functions(blocks), inputs, dynamic_shapes=shapes, strict=False)).graph
    out, left = [], list(traced.inputs)
    for index, (tensors, state) in enumerate(inputs):
        count = len(tensors) + len(state)
        own, left = left[:count], left[count:]
        graph = ir.convenience.extract(traced, own, [traced.outputs[index]])
        for value in (value for node in graph for value in node.outputs):
            value.shape = None  # in symbols of this trace, which mean something else in the whole
        graph.inputs.extend(graph.initializers.values())
        graph.initializers.clear()
        out.append(ir.Function(DOMAIN, f"block_{index}", graph=graph, attributes=()))
    return out


def _call(model: ir.Model, node: ir.Node, block: Block, function: ir.Function) -> None:
    """A call of the block's function in place of its operator."""
    state = block.module.state_dict()
    weights = [_initializer(model, f"{block.name}.{key}", TorchTensor(tensor)) for key, tensor in state.items()]
    constants = [
        _initializer(model, f"{function.name}.{value.name}", value.const_value)
        for value in function.inputs[len(node.inputs) + len(state) :]
    ]
    inputs = [*node.inputs, *weights, *constants]
    call = ir.Node(DOMAIN, function.name, inputs, num_outputs=1, name=block.name)
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [call], node.outputs, call.outputs)


def _initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol | None) -> ir.Value:
    """A weight, or a number that the tracer put in a graph."""
    assert tensor is not None  # of an initializer
    if name not in model.graph.initializers:
        shape = ir.Shape(tuple(tensor.shape.numpy()))
        value = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
        model.graph.register_initializer(value)
    return model.graph.initializers[name]
