"""A graph, looked at before it waits: known nodes, inputs that are there, links that fit, values in their ranges.

Errors have the form and the types of ComfyUI's execution.py (validate_prompt, validate_inputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nativesd.errors import UsageError
from nativesd.pictures.programs.comfyui import Graph
from nativesd.sampling.names import find_sampler, find_schedule
from nativesd.server.apis.comfy.nodes import NODES, Input, bounded
from nativesd.server.settings import Limits

MOST_NODES = 500


@dataclass
class Checked:
    """A graph that can be run: its nodes in an order in which each comes after those that it needs, and its outputs."""

    graph: Graph
    order: list[str]
    outputs: list[str]


class GraphError(Exception):
    """A graph that cannot be run."""

    def __init__(self, kind: str, message: str, details: str = "", nodes: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.answer = {
            "error": {"type": kind, "message": message, "details": details, "extra_info": {}},
            "node_errors": dict(nodes or {}),
        }


@dataclass
class _Report:
    nodes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, number: str, kind: str, message: str, details: str, name: str = "") -> None:
        extra = {"input_name": name} if name else {}
        self.nodes.setdefault(number, []).append(
            {"type": kind, "message": message, "details": details, "extra_info": extra}
        )


def check_graph(nodes: Any, lists: Mapping[str, list[str]], limits: Limits) -> Checked:
    """Raises GraphError for a graph that cannot be run, which names every node and input that is wrong."""
    if not isinstance(nodes, dict) or not nodes:
        raise GraphError("no_prompt", "No prompt provided", "prompt must be an object of nodes")
    if len(nodes) > MOST_NODES:
        raise GraphError("invalid_prompt", f"A graph may have {MOST_NODES} nodes, not {len(nodes)}")
    graph, report = Graph(nodes), _Report()
    for number in nodes:
        if graph.kind(number) not in NODES:
            kind = graph.kind(number) or "without a class_type"
            report.add(number, "missing_node_type", f"Node {kind} is not here", f"Node ID '#{number}': there are "
                       f"{', '.join(NODES)}")  # fmt: skip
    outputs = [number for number in nodes if graph.kind(number) in NODES and NODES[graph.kind(number)].ends]
    if not outputs and not report.nodes:
        raise GraphError("prompt_no_outputs", "Prompt has no outputs", "a graph ends in SaveImage or PreviewImage")
    for number in nodes:
        if number not in report.nodes:
            _check_node(graph, number, lists, limits, report)
    order: list[str] = []
    if not report.nodes:
        order = _ordered(graph, outputs, report)
    if report.nodes:
        first = next(iter(report.nodes.values()))[0]
        raise GraphError(
            "prompt_outputs_failed_validation", "Prompt outputs failed validation", first["message"],
            {number: {"errors": errors, "dependent_outputs": outputs, "class_type": graph.kind(number)}
             for number, errors in report.nodes.items()},
        )  # fmt: skip
    return Checked(graph, order, outputs)


def _check_node(graph: Graph, number: str, lists: Mapping[str, list[str]], limits: Limits, report: _Report) -> None:
    node, given = NODES[graph.kind(number)], graph.inputs(number)
    for name, declared in node.inputs.items():
        each = bounded(name, declared, limits)
        if name not in given:
            if each.required:
                report.add(number, "required_input_missing", "Required input is missing", name, name)
            continue
        source = graph.link(number, name)
        if source:
            _check_link(graph, number, name, each, report)
        elif each.linked:
            report.add(number, "bad_linked_input", "Bad linked input, must be a length-2 list of [node_id, slot_index]",
                       name, name)  # fmt: skip
        else:
            _check_value(number, name, each, given[name], lists, report)
    if graph.kind(number) == "KSamplerAdvanced":
        _check_advanced(graph, number, report)
    if "image_negative" in given and "image_negative" in node.inputs:
        report.add(number, "invalid_input_type", "image_negative is not heeded here", "image_negative",
                   "image_negative")  # fmt: skip


def _check_link(graph: Graph, number: str, name: str, each: Input, report: _Report) -> None:
    source, slot = graph.link(number, name), graph.inputs(number)[name][1]
    kind = graph.kind(source)
    outputs = NODES[kind].outputs if kind in NODES else ()
    if source not in graph.nodes or (kind in NODES and (type(slot) is not int or not 0 <= slot < len(outputs))):
        report.add(
            number, "bad_linked_input", "There is no such node or output", f"{name}: {source}, {slot}"[:100], name
        )
    elif kind in NODES and outputs[slot] != each.kind:
        report.add(number, "return_type_mismatch", "Return type mismatch between linked nodes",
                   f"{name}, received_type({outputs[slot]}) mismatch input_type({each.kind})", name)  # fmt: skip


def _check_value(
    number: str, name: str, each: Input, value: Any, lists: Mapping[str, list[str]], report: _Report
) -> None:
    match each.kind:
        case "STRING":
            if not isinstance(value, str):
                report.add(number, "invalid_input_type", f"{name} must be a text", name, name)
        case "BOOLEAN":
            if not isinstance(value, bool):
                report.add(number, "invalid_input_type", f"{name} must be true or false", name, name)
        case "COMBO":
            if not isinstance(value, str) or not _offered(name, value, lists[each.names]):
                report.add(number, "value_not_in_list", "Value not in list",
                           f"{name}: {value!r:.100} not in {lists[each.names]!r:.300}", name)  # fmt: skip
        case _:
            good = type(value) in (int, float) and math.isfinite(value)
            if not good or (each.kind == "INT" and value != int(value)):
                report.add(number, "invalid_input_type", f"Failed to convert an input value to a {each.kind} value",
                           f"{name}, {value!r:.100}", name)  # fmt: skip
            elif value < each.low:
                report.add(
                    number, "value_smaller_than_min", f"Value {value} smaller than min of {each.low}", name, name
                )
            elif value > each.high:
                report.add(
                    number, "value_bigger_than_max", f"Value {value:.6g} bigger than max of {each.high}", name, name
                )


def _offered(name: str, value: str, offered: list[str]) -> bool:
    """Whether a COMBO offers a value; a sampler or schedule by any of its names, a file with a suffix or without."""
    if value in offered:
        return True
    try:
        match name:
            case "sampler_name":
                return find_sampler(value) is not None
            case "scheduler":
                return find_schedule(value) is not None
    except UsageError:
        return False
    stem = value.rpartition(".")[0]
    files = ("ckpt_name", "lora_name", "control_net_name", "ipadapter_file", "clip_name", "model_name")
    return name in files and stem in offered


def _check_advanced(graph: Graph, number: str, report: _Report) -> None:
    """What of KSamplerAdvanced is not done here: passes that end early, keep their noise or add none."""
    given = graph.inputs(number)
    if given.get("add_noise") == "disable":
        report.add(number, "value_not_in_list", "add_noise must be enable here", "add_noise", "add_noise")
    if given.get("return_with_leftover_noise") == "enable":
        report.add(number, "value_not_in_list", "return_with_leftover_noise must be disable here",
                   "return_with_leftover_noise", "return_with_leftover_noise")  # fmt: skip
    steps, start, end = (given.get(name) for name in ("steps", "start_at_step", "end_at_step"))
    if isinstance(steps, int) and isinstance(start, int) and isinstance(end, int):
        if end < steps:
            report.add(number, "value_smaller_than_min", "end_at_step must be at least steps here", "end_at_step",
                       "end_at_step")  # fmt: skip
        if start >= steps:
            report.add(number, "value_bigger_than_max", "start_at_step must be below steps", "start_at_step",
                       "start_at_step")  # fmt: skip


def _ordered(graph: Graph, outputs: list[str], report: _Report) -> list[str]:
    """The nodes that outputs need, each after those that it needs; reports a circle."""
    order: list[str] = []
    done: set[str] = set()
    for output in outputs:
        path = [(output, _needed(graph, output))]
        on_path = {output}
        while path and output not in done:
            number, needed = path[-1]
            following = next(needed, None)
            if following is None:
                path.pop()
                on_path.discard(number)
                done.add(number)
                order.append(number)
            elif following in on_path:
                report.add(number, "dependency_cycle", "Dependency cycle detected", f"{number}, {following}")
                return []
            elif following not in done:
                path.append((following, _needed(graph, following)))
                on_path.add(following)
    return order


def _needed(graph: Graph, number: str) -> Iterator[str]:
    return (source for name in NODES[graph.kind(number)].inputs if (source := graph.link(number, name)))
