"""Siblings as separate convolutions: runtimes of CPUs split the output of a merged one by copies."""

from typing import Any

import numpy as np

from .. import onnx as graph

__all__ = ['separate_siblings']


def separate_siblings(model: Any) -> None:
    """Replace each convolution whose output is split after its ReLU by one convolution and ReLU for each part.

    Args:
        model: An ``onnx.ModelProto``; it is changed. The values stay the same, bit for bit or by the order of sums.
    """
    numpy_helper = graph.optional('onnx.numpy_helper')
    nodes, initializers = model.graph.node, model.graph.initializer
    constants = {each.name: numpy_helper.to_array(each) for each in initializers}
    constants |= {node.output[0]: numpy_helper.to_array(node.attribute[0].t) for node in nodes
                  if node.op_type == 'Constant'}
    # The exporter keeps equal tensors once, under one of their names.
    constants |= {node.output[0]: constants[node.input[0]] for node in nodes
                  if node.op_type == 'Identity' and node.input[0] in constants}
    producers = {output: node for node in nodes for output in node.output}
    for split in [node for node in nodes if node.op_type == 'Split']:
        relu = producers[split.input[0]]
        convolution = producers[relu.input[0]]
        tensors = [constants[name] for name in convolution.input[1:]]  # weight, bias
        ends = np.cumsum(constants[split.input[1]])[:-1]
        place = list(nodes).index(convolution)
        for index, parts in enumerate(zip(*(np.split(tensor, ends) for tensor in tensors), strict=True)):
            names = [f'{name}.{index}' for name in convolution.input[1:]]
            initializers.extend(map(numpy_helper.from_array, parts, names))
            hidden = f'{convolution.output[0]}.{index}'
            for node, inputs, output in ((relu, [hidden], split.output[index]),
                                         (convolution, [convolution.input[0], *names], hidden)):
                nodes.insert(place, _copy(node, index, inputs, output))
        for node in (split, relu, convolution):
            nodes.remove(node)
    _drop_unused(model.graph)


def _copy(node: Any, index: int, inputs: list[str], output: str) -> Any:
    copied = type(node)()
    copied.CopyFrom(node)
    copied.name = f'{node.name}.{index}'
    copied.input[:], copied.output[:] = inputs, [output]
    return copied


def _drop_unused(content: Any) -> None:
    """Remove constants that no node reads."""
    used = {name for node in content.node for name in node.input}
    for node in [node for node in content.node if node.op_type == 'Constant' and node.output[0] not in used]:
        content.node.remove(node)
    for tensor in [tensor for tensor in content.initializer if tensor.name not in used]:
        content.initializer.remove(tensor)
