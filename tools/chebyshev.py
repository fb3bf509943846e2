"""Polynomials through a function at the Chebyshev nodes of an interval, for tools that print coefficients."""

from __future__ import annotations

from collections.abc import Callable

import mpmath as mp


def interpolate(function: Callable[[mp.mpf], mp.mpf], degree: int, low: mp.mpf, high: mp.mpf) -> list[mp.mpf]:
    """Coefficients, lowest power first."""
    count = degree + 1
    middle, half = (mp.mpf(low) + high) / 2, (mp.mpf(high) - low) / 2
    nodes = [middle + half * mp.cos(mp.pi * (2 * k + 1) / (2 * count)) for k in range(count)]
    powers, values = mp.matrix(count, count), mp.matrix(count, 1)
    for row, x in enumerate(nodes):
        values[row] = function(x)
        for power in range(count):
            powers[row, power] = x**power
    return list(mp.lu_solve(powers, values))
