"""Calls of the operators with one argument that is wrong, or the same in another form: what a program of its own tries.

``python -m support.mutations few`` (or ``more``) prints every attempt before it is made, so that the last line tells
which one ended the process, and of each that went wrong why, after ``FAULT``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fused_rnn
from fused_rnn.check import ERROR_LIMITS, scaled_error
from fused_rnn.settings import INTEGER_SETTINGS, Within

from .cases import Case, CellCase, Data, incoming_gradients, run

FEW: list[tuple[Case | CellCase, dict[str, Any]]] = [
    (Case(num_layers=2, hx=True, dropout=0.5), {"mask": True}),
    (Case("GRU", num_layers=2, bidirectional=True, hx=True, packing="unsorted"), {}),
    (Case(num_layers=2, hx=True, dropout=0.5), {"return_states": True}),
    (CellCase("LSTM"), {}),
    (CellCase("GRU"), {}),
    (Case("GRU", num_layers=2, bidirectional=True, hx=True), {"derivatives": True}),
    (Case(num_layers=2, proj=True, hx=True), {"mask": True, "quantized": torch.int8}),
]
MORE: list[tuple[Case | CellCase, dict[str, Any]]] = [
    (Case(num_layers=2, bidirectional=True, hx=True, packing="sorted"), {}),
    (Case(num_layers=3, proj=True, hx=True, dropout=0.5, bias=False, dtype=torch.bfloat16), {}),
    (Case(num_layers=2, hx=True, batch_first=True), {"mask": True, "recompute": True}),
    (Case("GRU", bidirectional=True, hx=True, dtype=torch.float64), {"mask": True}),
    (Case("RNN_TANH", num_layers=2, hx=True, batch_first=True), {"mask": True}),
    (Case("RNN_RELU", num_layers=2, hx=True, dropout=0.5), {}),
    (Case(num_layers=2, bidirectional=True, hx=True, dtype=torch.bfloat16), {"mask": True, "return_states": True}),
    (Case("GRU", num_layers=2, packing="sorted"), {"return_states": True}),
    (CellCase("LSTM", bias=False, dtype=torch.float16), {}),
    (Case(num_layers=2, hx=True, batch_first=True, dropout=0.5), {"derivatives": True}),
    (Case("RNN_RELU", dtype=torch.float64), {"derivatives": True}),
    (Case("GRU", num_layers=2, batch_first=True), {"derivatives": True, "mask": True}),
    (
        Case("GRU", bidirectional=True, batch_first=True, bias=False, hx=True),
        {"quantized": torch.bfloat16, "mask": True},
    ),
    (CellCase("RNN_TANH"), {}),
    (CellCase("RNN_RELU", dtype=torch.float64), {}),
]
# May be left out, or empty for none: as good as given.
OPTIONAL = ("h0", "c0", "grad_output", "grad_h_n", "grad_c_n", "grad_cells", "grad_hidden", "grad_h", "grad_c")
OPTIONAL += ("input_t", "h0_t", "c0_t", "grad_output_t", "grad_h_n_t", "grad_c_n_t", "mask")
# Lists in which (0,) stands for none.
LISTS_WITH_NONE = ("controls", "params_t")
OF_DERIVATIVES = ("rnn_tangent", "rnn_backward_tangent", "rnn_backward_each", "rnn_backward_stacked")
# Made by the forward pass for the backward pass alone, which need not take them in another form.
SAVED = ("gates", "cells", "hidden")
REFUSALS = (RuntimeError, TypeError)
# Among the settings of a call that has something within.
BPTT_STEPS = len(INTEGER_SETTINGS) + Within._fields.index("bptt_steps")


class Attempt(NamedTuple):
    """A call with one argument changed; ``verdict``: it must be "refused", give "equal" results, may be "either" of
    these, or "any": accepted with whatever results."""

    what: str
    args: list[Any]
    verdict: str


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "fused_rnn":
            assert not kwargs
            self.calls.append((func, tree_map_only(Tensor, lambda tensor: tensor.detach(), args)))
        return result


def recorded(case: Case | CellCase, options: dict[str, Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    module = case.build(fused_rnn)
    given: dict[str, Any] = {}
    if options.get("recompute"):
        module.recompute = True
    if options.get("mask"):
        assert isinstance(case, Case)
        mask = torch.ones(case.steps, case.batch, dtype=torch.bool)
        mask[1::2, 1] = mask[:, 2] = False
        given["mask"] = mask.T if case.batch_first else mask
    data = case.data()
    with fused_rnn.use_backend("fused"), Recorder() as recorder:
        if options.get("return_states"):
            results = tree_leaves(module(data.input, data.hx, **given, return_states=True))
            outputs = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
            leaves = [*data.leaves.values(), *module.parameters()]
            torch.autograd.grad(outputs, leaves, incoming_gradients(outputs))
        elif "quantized" in options:
            with torch.no_grad():
                fused_rnn.quantize(module.eval(), options["quantized"])(data.input, data.hx, **given)
        elif options.get("derivatives"):
            take_derivatives(module, case, data, given)
            return [call for call in recorder.calls if call[0].overloadpacket.__name__ in OF_DERIVATIVES]
        else:
            run(module, data, **given)
    return recorder.calls


def take_derivatives(module: Any, case: Any, data: Any, given: dict[str, Any]) -> None:
    """Calls of all operators of derivatives: forward mode, the gradient of a backward pass, gradients per example.

    ``given``: what the last are called with besides.
    """
    leaves = [*data.leaves.values(), *module.parameters()]
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.randn_like(t)) for t in leaves]
        count = len(data.leaves)
        parameters = dict(zip((name for name, _ in module.named_parameters()), duals[count:], strict=True))
        dual = Data(case, duals[0], tuple(duals[1:count]))
        functional_call(module, parameters, (dual.input, dual.hx))
    outputs = list(case.outputs(module(data.input, data.hx)).values())
    seeds = [torch.randn_like(t, requires_grad=True) for t in outputs]
    found = torch.autograd.grad(outputs, leaves, seeds, create_graph=True)
    torch.autograd.grad(found, [*leaves, *seeds], incoming_gradients(list(found)))
    own = {name: p.detach() for name, p in module.named_parameters()}
    inputs = data.input.detach()
    module.eval()  # without dropout

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return sum(t.square().sum() for t in tree_leaves(functional_call(module, parameters, (x,), given)))

    vmap(grad(loss), in_dims=(None, 0))(own, torch.stack([inputs, inputs]))
    vmap(grad(loss), in_dims=(0, None))({name: torch.stack([p, p]) for name, p in own.items()}, inputs)


def wrong_tensors(t: Tensor) -> Iterator[tuple[str, Any]]:
    """Other shapes, types, places and contents than a call can do with."""
    yield "on meta", t.to("meta")
    yield "of strings", "tensor"
    yield "a number", 1.5
    yield "sparse", t.to_sparse()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.uint8, torch.complex64):
        if dtype != t.dtype:
            yield f"of {dtype}", t.to(dtype)
    yield "of one more dimension", t.unsqueeze(0)
    yield "of one more dimension at the end", t.unsqueeze(-1)
    yield "of no dimension", t.new_zeros(())
    yield "of very many rows", t.new_zeros(()).expand(2**62, *t.shape[1:]) if t.dim() == 1 else _giant(t)
    if t.dim() > 1:
        yield "flat", t.flatten()
        yield "without its first dimension", t.flatten(0, 1)
    for dim, size in enumerate(t.shape):
        if size:
            yield f"one longer in dimension {dim}", torch.cat([t, t.narrow(dim, 0, 1)], dim)
            yield f"empty in dimension {dim}", t.narrow(dim, 0, 0)
        if size > 1:
            yield f"one shorter in dimension {dim}", t.narrow(dim, 0, size - 1)
            yield f"of one in dimension {dim}", t.narrow(dim, 0, 1)
    if t.numel():
        for name, left in (("freed", 0), ("cut", t.numel() * t.element_size() - 1)):
            spoilt = t.clone(memory_format=torch.contiguous_format)
            spoilt.untyped_storage().resize_(left)
            yield name, spoilt


def _giant(t: Tensor) -> Tensor:
    """A first dimension as large as the others allow: any product with another size overflows."""
    others = max(1, t[0].numel())
    return t.new_zeros(()).expand((2**63 - 1) // others, *t.shape[1:])


def equivalent_tensors(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "every second element", torch.stack([t, torch.full_like(t, 1)], -1).select(-1, 0)
    yield "behind an offset", torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape)
    if t.dim() > 1:
        yield "in another order of memory", t.transpose(0, -1).contiguous().transpose(0, -1)
    if t.is_floating_point():
        yield "a lazy negative", torch._neg_view(-t)


def on_meta(args: tuple[Any, ...], keep: Tensor | None) -> list[Any]:
    return tree_map_only(Tensor, lambda t: t if t is keep or t.dtype == torch.int64 else t.to("meta"), list(args))


def attempts(operator: Any, args: tuple[Any, ...]) -> Iterator[Attempt]:
    for place, argument in enumerate(operator._schema.arguments):

        def changed(value: Any, place: int = place) -> list[Any]:
            return [*args[:place], value, *args[place + 1 :]]

        name, value = argument.name, args[place]
        if isinstance(value, Tensor):
            yield from _of_tensor(name, value, changed)
            yield Attempt(f"{name} alone not on meta", on_meta(args, value), "refused")
            if name in OPTIONAL and operator.name() != "fused_rnn::cell_forward":
                yield Attempt(f"{name} None", changed(None), "any")
            else:
                yield Attempt(f"{name} None", changed(None), "refused")
        elif name in ("params", "params_t", "controls"):
            for index, t in enumerate(value):
                replaced = [value[:index], value[index + 1 :]]
                is_none = name in LISTS_WITH_NONE and t.shape == (0,)
                if not is_none:
                    label = f"{name}[{index}]"
                    for attempt in _of_tensor(label, t, lambda x, r=replaced: changed([*r[0], x, *r[1]])):
                        if name in LISTS_WITH_NONE and len(attempt.args[place][index : index + 1]):
                            given = attempt.args[place][index]
                            # which stands for none
                            if isinstance(given, Tensor) and given.shape == (0,):
                                continue
                        yield attempt
                    if t.dtype != torch.int64:
                        yield Attempt(f"{label} alone not on meta", on_meta(args, t), "refused")
                yield Attempt(f"{name} without {index}", changed([*replaced[0], *replaced[1]]), "refused")
                yield Attempt(f"{name} with {index} None", changed([*replaced[0], None, *replaced[1]]), "refused")
            if value:
                yield Attempt(f"{name} with one more", changed([*value, value[-1]]), "refused")
            if name in ("params", "params_t"):
                yield Attempt(f"no {name}", changed([]), "refused" if name == "params" else "any")
            yield Attempt(f"{name} None", changed(None), "refused")
        elif name in ("settings", "needs"):
            for index in range(len(value)):
                for other in (-1, 2, 4, 2**62 + 1, -(2**63)) if name == "settings" else (True, False):
                    # as many steps as one likes
                    may_be_large = index == BPTT_STEPS and len(value) > BPTT_STEPS + 1 and other > 0
                    far = name == "settings" and other not in (2, 4) and not may_be_large
                    changed_list = changed([*value[:index], other, *value[index + 1 :]])
                    yield Attempt(f"{name}[{index}] = {other}", changed_list, "refused" if far else "any")
                yield Attempt(f"{name} of the first {index}", changed(value[:index]), "refused")
            yield Attempt(f"{name} with one more", changed([*value, value[-1]]), "refused")
            yield Attempt(f"{name} of words", changed(["a"] * len(value)), "refused")
            yield Attempt(f"{name} None", changed(None), "refused")
        elif name == "numbers":
            yield Attempt("numbers of one", changed([0.5]), "refused")
        elif value is None:
            for what, t in (("as input", args[[a.name for a in operator._schema.arguments].index("input")]),):
                yield Attempt(f"{name} {what}", changed(t), "refused")
        elif name == "groups":
            for other in (-1, 0, 2**62, args[0].shape[1] + 1):
                yield Attempt(f"groups {other}", changed(other), "refused")
        else:
            assert isinstance(value, bool)
            yield Attempt(f"{name} {not value}", changed(not value), "any")
            yield Attempt(f"{name} a word", changed("a"), "refused")


def _of_tensor(name: str, t: Tensor, changed: Any) -> Iterator[Attempt]:
    for what, value in wrong_tensors(t):
        yield Attempt(f"{name} {what}", changed(value), "refused")
    if t.numel():
        for what, value in equivalent_tensors(t):
            yield Attempt(f"{name} {what}", changed(value), "either" if name in SAVED else "equal")


def judge(operator: Any, attempt: Attempt, right: Any) -> str | None:
    """What is wrong with what came of it."""
    try:
        found = operator(*attempt.args)
    except REFUSALS as error:
        return None if attempt.verdict != "equal" else f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if attempt.verdict == "refused":
        return "accepted"
    by_blas = operator.overloadpacket.__name__ in OF_DERIVATIVES  # whose bits depend on where its operands stand

    def same(a: Tensor, b: Tensor) -> bool:
        return scaled_error(a, b.double()) <= ERROR_LIMITS[b.dtype] if by_blas else torch.equal(a, b)

    if attempt.verdict != "any" and not all(
        same(a, b) for a, b in zip(tree_leaves(found), tree_leaves(right), strict=True)
    ):
        return "other results"
    return None


def main(which: str) -> None:
    torch.set_num_threads(1)
    count = 0
    for case, options in {"few": FEW, "more": MORE}[which]:
        for operator, args in recorded(case, options):
            with torch.no_grad():
                right = operator(*args)
                for attempt in attempts(operator, args):
                    what = f"{operator.name()} of {case} {options}: {attempt.what}"
                    print(what, flush=True)
                    fault = judge(operator, attempt, right)
                    count += 1
                    if fault:
                        print("FAULT", what, "-", fault.splitlines()[0][:200], flush=True)
    print(f"{count} attempts", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
