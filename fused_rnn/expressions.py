"""The step of a custom cell as a graph of operations: its derivative, and its text in C++ and in PyTorch.

A graph is a list of nodes, each an operation and its arguments, which are nodes before it. What a header's trace
(``csrc/cells/trace.h``) has becomes such a graph; :func:`differentiate` adds the nodes of the backward step, by reverse
mode; :class:`Step` decides what the forward step has to keep for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Graph", "Node", "Step", "Trace", "differentiate", "evaluate"]


class Node(NamedTuple):
    """An operation. ``arguments`` are numbers of nodes; of an input its name and index, of a constant its value."""

    operation: str
    arguments: tuple[Any, ...]

    @property
    def operands(self) -> tuple[int, ...]:
        return () if self.operation in ("input", "constant") else self.arguments


class Graph:
    """Nodes, of which none stands there twice; what arithmetic makes trivial is left out."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._numbers: dict[Node, int] = {}

    def input(self, name: str, index: int) -> int:
        return self._put(Node("input", (name, index)))

    def constant(self, value: float) -> int:
        return self._put(Node("constant", (float(value),)))

    def add(self, operation: str, *operands: int) -> int:
        values = [self._value(operand) for operand in operands]
        if operation in _ARITHMETIC and all(value is not None for value in values):
            try:
                return self.constant(_ARITHMETIC[operation](*values))
            except ZeroDivisionError:
                pass
        a, b = values[0], values[1] if len(values) > 1 else None
        if operation == "add" and a == 0:
            return operands[1]
        if operation in ("add", "sub") and b == 0:
            return operands[0]
        if operation == "sub" and a == 0:
            return self.add("neg", operands[1])
        if operation == "mul" and a == 1:
            return operands[1]
        if operation in ("mul", "div") and b == 1:
            return operands[0]
        if operation == "mul" and -1 in (a, b):
            return self.add("neg", operands[1 if a == -1 else 0])
        if operation == "neg" and self.nodes[operands[0]].operation == "neg":
            return int(self.nodes[operands[0]].arguments[0])
        return self._put(Node(operation, operands))

    def _value(self, node: int) -> float | None:
        return self.nodes[node].arguments[0] if self.nodes[node].operation == "constant" else None

    def _put(self, node: Node) -> int:
        if node not in self._numbers:
            self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[node]

    def reached_from(self, outputs: Iterable[int]) -> set[int]:
        """These nodes and all that they are made of."""
        reached, waiting = set(), list(outputs)
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                waiting += self.nodes[node].operands
        return reached


_ARITHMETIC: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
}


# The gradients of an operation's operands from d, the gradient of its result y; None for none.
_Gradients = Callable[[Graph, int, int, Sequence[int]], Sequence["int | None"]]


def _of_select(g: Graph, d: int, y: int, args: Sequence[int]) -> Sequence[int | None]:
    zero = g.constant(0)
    return None, g.add("select", args[0], d, zero), g.add("select", args[0], zero, d)


def _of_div(g: Graph, d: int, y: int, args: Sequence[int]) -> Sequence[int | None]:
    of_numerator = g.add("div", d, args[1])
    return of_numerator, g.add("neg", g.add("mul", of_numerator, y))


def _of_tanh(g: Graph, d: int, y: int, args: Sequence[int]) -> Sequence[int | None]:
    return (g.add("mul", d, g.add("sub", g.constant(1), g.add("mul", y, y))),)


def _of_sigmoid(g: Graph, d: int, y: int, args: Sequence[int]) -> Sequence[int | None]:
    return (g.add("mul", g.add("mul", d, y), g.add("sub", g.constant(1), y)),)


_GRADIENTS: dict[str, _Gradients] = {
    "add": lambda g, d, y, args: (d, d),
    "sub": lambda g, d, y, args: (d, g.add("neg", d)),
    "mul": lambda g, d, y, args: (g.add("mul", d, args[1]), g.add("mul", d, args[0])),
    "div": _of_div,
    "neg": lambda g, d, y, args: (g.add("neg", d),),
    "tanh": _of_tanh,
    "sigmoid": _of_sigmoid,
    "exp": lambda g, d, y, args: (g.add("mul", d, y),),
    "log": lambda g, d, y, args: (g.add("div", d, args[0]),),
    "softplus": lambda g, d, y, args: (g.add("mul", d, g.add("sigmoid", args[0])),),
    "select": _of_select,
    "less": lambda g, d, y, args: (None, None),
    "less_equal": lambda g, d, y, args: (None, None),
}


def differentiate(graph: Graph, seeds: Mapping[int, int], inputs: Iterable[int]) -> dict[int, int]:
    """Adds the gradients of ``inputs`` to the graph, by reverse mode.

    Args:
        seeds: for a node its gradient's node. inputs: nodes whose gradients are wanted.

    Returns:
        the gradient's node of each of them that has one other than zero.
    """
    gradients: dict[int, int] = dict(seeds)
    depends = _dependents(graph, set(inputs))
    for node in sorted(graph.reached_from(seeds), reverse=True):  # a node's number is above those of its operands
        if node not in gradients or node not in depends:
            continue
        operation, operands = graph.nodes[node].operation, graph.nodes[node].operands
        if not operands:
            continue
        for operand, gradient in zip(
            operands, _GRADIENTS[operation](graph, gradients[node], node, operands), strict=True
        ):
            if gradient is None or operand not in depends:
                continue
            gradients[operand] = (
                gradient if operand not in gradients else graph.add("add", gradients[operand], gradient)
            )
    return {node: gradients[node] for node in inputs if node in gradients}


def _dependents(graph: Graph, nodes: set[int], known: Collection[int] = ()) -> set[int]:
    """These nodes and all that are made of them, but for those whose values are known anyway."""
    result = nodes.difference(known)
    for number, node in enumerate(graph.nodes):
        if number not in known and any(operand in result for operand in node.operands):
            result.add(number)
    return result


class Trace:
    """What a header's trace says: a graph, its outputs by name and index, and the sizes of the cell."""

    def __init__(self, lines: str) -> None:
        self.graph = Graph()
        self.outputs: dict[tuple[str, int], int] = {}
        self.gates = self.states = self.saved = 0
        numbers: list[int] = []
        for line in lines.splitlines():
            kind, *values = json.loads(line)
            if kind == "cell":
                self.gates, self.states, self.saved = values
            elif kind == "output":
                name, index, number = values
                self.outputs[name, index] = numbers[number]
            elif kind == "input":
                numbers.append(self.graph.input(*values))
            elif kind == "constant":
                numbers.append(self.graph.constant(*values))
            else:
                numbers.append(self._operation(kind, [numbers[value] for value in values]))

    def _operation(self, kind: str, operands: list[int]) -> int:
        """Those that are others in disguise, in which comparisons are false for NaN, which therefore stays."""
        g = self.graph
        if kind == "relu":
            return g.add("select", g.add("less_equal", operands[0], g.constant(0)), g.constant(0), operands[0])
        if kind == "abs":
            return g.add("select", g.add("less", operands[0], g.constant(0)), g.add("neg", operands[0]), operands[0])
        if kind == "max":
            return g.add("select", g.add("less_equal", operands[0], operands[1]), operands[1], operands[0])
        if kind == "min":
            return g.add("select", g.add("less_equal", operands[0], operands[1]), operands[0], operands[1])
        return g.add(kind, *operands)


# Operations that cost more than a value that is kept.
_EXPENSIVE = ("tanh", "sigmoid", "exp", "log", "softplus", "div")


class Step:
    """The forward and backward step of a cell as kernels have them.

    ``apart``: how many gates, the last ones, have W_ih x and W_hh h by themselves; of the others there is the sum
    alone, an input ``a``. ``saved``: how many values the forward step keeps.
    """

    def __init__(self, trace: Trace) -> None:
        self.gates, self.states = trace.gates, trace.states
        self.graph = graph = Graph()
        self.apart = _gates_apart(trace)
        copied = self._copy(trace, trace.graph.reached_from(trace.outputs.values()))
        self.outputs = {place: copied[node] for place, node in trace.outputs.items() if place[0] in ("h", "state")}
        self._by_hand = trace.saved > 0
        if self._by_hand:
            self._keep = [copied[trace.outputs["saved", i]] for i in range(trace.saved)]
            of_gates = {("dx", g): copied[trace.outputs["dx", g]] for g in range(self.gates)}
            of_gates |= {place: copied[node] for place, node in trace.outputs.items() if place[0] == "dr"}
            before = {("dh_prev", 0): trace.outputs.get(("dh_prev", 0))}
            before |= {("dstate_prev", i): trace.outputs["dstate_prev", i] for i in range(self.states)}
            self.gradients = of_gates | {place: copied[n] for place, n in before.items() if n is not None}
        else:
            self._differentiate(graph)
        self.reads_h = ("h", 0) in self._inputs_of([*self.outputs.values(), *self.gradients.values()])

    def _copy(self, trace: Trace, wanted: set[int]) -> dict[int, int]:
        """The trace in this graph, where a gate that is not apart has its sum as an input."""
        graph, copied = self.graph, {}
        first_apart = self.gates - self.apart
        for number in sorted(wanted):
            operation, arguments = trace.graph.nodes[number]
            gate = _gate_of_sum(trace.graph, number)
            if gate is not None and gate < first_apart:
                copied[number] = graph.input("a", gate)
            elif operation == "input":
                if not (arguments[0] in ("x", "r") and arguments[1] < first_apart):
                    copied[number] = graph.input(*arguments)
            elif operation == "constant":
                copied[number] = graph.constant(*arguments)
            else:
                copied[number] = graph.add(operation, *(copied[a] for a in arguments))
        return copied

    def _differentiate(self, graph: Graph) -> None:
        first_apart = self.gates - self.apart
        inputs = {("dx", g): graph.input("a" if g < first_apart else "x", g) for g in range(self.gates)}
        inputs |= {("dr", g): graph.input("r", g) for g in range(first_apart, self.gates)}
        inputs |= {("dstate_prev", i): graph.input("state", i) for i in range(self.states)}
        inputs["dh_prev", 0] = graph.input("h", 0)
        seeds: dict[int, int] = {}
        forward = len(graph.nodes)
        for (name, index), node in self.outputs.items():
            seed = graph.input(f"d{name}", index)
            seeds[node] = seed if node not in seeds else graph.add("add", seeds[node], seed)
        found = differentiate(graph, seeds, inputs.values())
        zero = graph.constant(0)
        self.gradients = {place: found.get(node, zero) for place, node in inputs.items()}
        self._keep = self._to_keep(graph, forward)

    def _to_keep(self, graph: Graph, forward: int) -> list[int]:
        """Nodes of the forward step from which, and the states before it, the backward step has all it needs."""
        inner = {n for n in range(forward) if graph.nodes[n].operation == "input" and self._is_inner(graph.nodes[n])}
        self._known = {self.outputs["state", i]: f"states[{i}]" for i in range(self.states)}  # kept in any case
        depends = _dependents(graph, inner, self._known)
        keep: set[int] = set()
        waiting = list(self.gradients.values())
        seen: set[int] = set()
        while waiting:
            number = waiting.pop()
            if number in seen or number in self._known:
                continue
            seen.add(number)
            node = graph.nodes[number]
            is_forward = number < forward and number in depends
            if is_forward and (node.operation == "input" or node.operation in _EXPENSIVE):
                keep.add(number)
            else:
                waiting += node.operands
        return sorted(keep) or [self.outputs["h", 0]]  # kernels of a cell that keeps nothing are the plain RNN's

    @staticmethod
    def _is_inner(node: Node) -> bool:
        return node.arguments[0] in ("a", "x", "r")

    def _inputs_of(self, outputs: Iterable[int]) -> set[tuple[str, int]]:
        reached = self.graph.reached_from(outputs)
        return {self.graph.nodes[n].arguments for n in reached if self.graph.nodes[n].operation == "input"}

    @property
    def saved(self) -> int:
        return len(self._keep)

    def cpp(self, name: str) -> str:
        """The cell as a C++ struct of that name, as ``csrc/cells/cell.h`` has them."""
        first_apart = self.gates - self.apart
        joint, apart = list(range(first_apart)), list(range(first_apart, self.gates))
        grads = [("dx", g) for g in (*apart, *joint)] + [("dr", g) for g in apart]
        forward = _Cpp(self.graph, _FORWARD_PLACES)
        writes = [
            f"{'h' if place == 'h' else f'states[{i}]'} = {forward.value(n)};" for (place, i), n in self.outputs.items()
        ]
        writes += [f"saved[{i}] = {forward.value(node)};" for i, node in enumerate(self._keep)]
        kept = {} if self._by_hand else {node: f"saved[{i}]" for i, node in enumerate(self._keep)} | self._known
        backward = _Cpp(self.graph, _BACKWARD_PLACES, kept)
        ends = [f"grads[{i}] = {backward.value(self.gradients[place])};" for i, place in enumerate(grads)]
        h_prev = self.gradients.get(("dh_prev", 0), self.graph.constant(0))
        ends.append(f"dh_prev = {backward.value(h_prev)};")
        of_states = [self.gradients["dstate_prev", i] for i in range(self.states)]
        ends += [f"dstates_prev[{i}] = {backward.value(node)};" for i, node in enumerate(of_states)]
        return _STRUCT.format(
            name=name,
            gates=self.gates,
            states=self.states,
            saved=self.saved,
            grad_gates=self.gates + self.apart,
            reads_h="true" if self.reads_h else "false",
            first_apart=first_apart,
            input_gates=", ".join(map(str, (*apart, *joint))),
            hidden_first=self.apart,
            hidden_gates=", ".join(map(str, (*joint, *apart))),
            forward="\n    ".join([*forward.lines, *writes]),
            backward="\n    ".join([*backward.lines, *ends]),
        )


def _gate_of_sum(graph: Graph, number: int) -> int | None:
    """g where the node is x[g] + r[g]."""
    operation, arguments = graph.nodes[number]
    if operation != "add":
        return None
    operands = [graph.nodes[a] for a in arguments]
    if any(node.operation != "input" for node in operands):
        return None
    (name_a, a), (name_b, b) = (node.arguments for node in operands)
    return int(a) if {name_a, name_b} == {"x", "r"} and a == b else None


def _gates_apart(trace: Trace) -> int:
    """How many gates from the last one on: up to the first whose x or r is used otherwise than in x[g] + r[g]."""
    graph = trace.graph
    outputs = [node for place, node in trace.outputs.items() if place[0] in ("h", "state", "saved")]
    first = trace.gates
    used = [(n, graph.nodes[n].operands) for n in graph.reached_from(outputs)] + [(-1, tuple(outputs))]
    for number, operands in used:
        if number >= 0 and _gate_of_sum(graph, number) is not None:
            continue
        for operand in operands:
            node = graph.nodes[operand]
            if node.operation == "input" and node.arguments[0] in ("x", "r"):
                first = min(first, node.arguments[1])
    return trace.gates - first


_FORWARD_PLACES = {"a": "r[{}]", "x": "x[{}]", "r": "r[{}]", "h": "h_prev", "state": "states_prev[{}]"}
_BACKWARD_PLACES = {
    "h": "h_prev",
    "state": "states_prev[{}]",
    "dh": "dh",
    "dstate": "dstates[{}]",
    "after": "states[{}]",
    "saved": "saved[{}]",
}

_STRUCT = """struct {name} {{
  static constexpr CellKind kind = CellKind::custom;
  static constexpr int gates = {gates};
  static constexpr int saved = {saved};
  static constexpr int grad_gates = {grad_gates};
  static constexpr int states = {states};
  static constexpr bool has_cell = states > 0;
  static constexpr bool reads_h = {reads_h};
  static constexpr bool hidden_bias_apart(int gate) {{ return gate >= {first_apart}; }}
  static constexpr GateGrads input_grads = {{0, {{{input_gates}}}}};
  static constexpr GateGrads hidden_grads = {{{hidden_first}, {{{hidden_gates}}}}};

  template <class V>
  static FRNN_HOST_DEVICE void forward(const V* x, const V* r, const V& h_prev, const V* states_prev, V& h, V* states,
                                       V* saved) {{
    using S [[maybe_unused]] = typename Lanes<V>::Scalar;
    {forward}
  }}

  template <class V>
  static FRNN_HOST_DEVICE void backward(const V* saved, const V& h_prev, const V* states_prev, const V* states,
                                        const V& dh, const V* dstates, V* grads, V& dh_prev, V* dstates_prev) {{
    using S [[maybe_unused]] = typename Lanes<V>::Scalar;
    {backward}
  }}
}};
"""

_CPP: dict[str, str] = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "tanh": "tanh<V>({})",
    "sigmoid": "sigmoid<V>({})",
    "exp": "exponential<V>({})",
    "log": "logarithm<V>({})",
    "softplus": "softplus<V>({})",
    "select": "Lanes<V>::select({}, {}, {})",
    "less": "{} < {}",
    "less_equal": "{} <= {}",
}
_WITH_NUMBERS = ("add", "sub", "mul", "div", "less", "less_equal")


class _Cpp:
    """Lines of C++, one for each operation, in the order in which they are asked for."""

    def __init__(self, graph: Graph, places: Mapping[str, str], kept: Mapping[int, str] | None = None) -> None:
        self._graph, self._places = graph, places
        self._names = dict(kept or {})
        self.lines: list[str] = []

    def value(self, node: int) -> str:
        """A name that holds the node's value after the lines."""
        operation, arguments = self._graph.nodes[node]
        if node in self._names:
            return self._names[node]
        if operation == "input":
            return self._places[arguments[0]].format(arguments[1])
        if operation == "constant":
            return f"splat<V>(S({arguments[0]!r}))"
        operands = [self._operand(operation, arguments, i) for i in range(len(arguments))]
        name = self._names[node] = f"t{len(self._names)}"
        self.lines.append(f"const auto {name} = {_CPP[operation].format(*operands)};")
        return name

    def _operand(self, operation: str, arguments: Sequence[int], index: int) -> str:
        node = self._graph.nodes[arguments[index]]
        others = [a for i, a in enumerate(arguments) if i != index]
        is_number = node.operation == "constant"
        if is_number and operation in _WITH_NUMBERS and self._graph.nodes[others[0]].operation != "constant":
            return f"S({node.arguments[0]!r})"
        return self.value(arguments[index])


_TORCH: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "log": torch.log,
    "softplus": lambda a: torch.logaddexp(a, torch.zeros_like(a)),
    "select": torch.where,
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
}


def evaluate(graph: Graph, outputs: Sequence[int], inputs: Mapping[tuple[str, int], Tensor]) -> list[Tensor]:
    """The values of ``outputs`` in PyTorch's operations, from those of the graph's inputs by name and index."""
    like = next(iter(inputs.values()))
    values: dict[int, Any] = {}
    for number in sorted(graph.reached_from(outputs)):
        operation, arguments = graph.nodes[number]
        if operation == "input":
            values[number] = inputs[arguments]
        elif operation == "constant":
            values[number] = torch.full_like(like, arguments[0])
        else:
            values[number] = _TORCH[operation](*(values[a] for a in arguments))
    return [values[output] for output in outputs]
