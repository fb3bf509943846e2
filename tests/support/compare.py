"""Comparisons whose failure names the tensor and the size of the error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_rnn.check import ERROR_LIMITS, scaled_errors


def assert_within(actual: Mapping[str, Tensor], reference: Mapping[str, Tensor], limit: float | None = None) -> None:
    """Every tensor within `limit` epsilons (the dtype's `ERROR_LIMITS` entry unless given) of the float64 reference."""
    found = scaled_errors(actual, reference)
    wrong = {
        name: f"{error:.3g} epsilons of {actual[name].dtype}"
        for name, error in found.items()
        if not error <= (ERROR_LIMITS[actual[name].dtype] if limit is None else limit)
    }
    assert not wrong, f"off by {wrong}"


def assert_same(actual: Any, expected: Any) -> None:
    """Every tensor, in tuples and dictionaries, too, equal bit for bit, NaN equal to NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_close_to_twin(actual: Mapping[str, Tensor], twin: Mapping[str, Tensor]) -> None:
    """Every tensor as near to torch.nn's, of the same dtype, as two right results are.

    Both may be off by the dtype's limit to different sides.
    """
    for name, tensor in twin.items():
        assert actual[name].dtype == tensor.dtype, f"{name}: {actual[name].dtype}, torch.nn gives {tensor.dtype}"
    limit = 2 * max(ERROR_LIMITS[tensor.dtype] for tensor in twin.values())
    assert_within(actual, {name: tensor.double() for name, tensor in twin.items()}, limit)
