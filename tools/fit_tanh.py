"""Prints csrc/cpu/tanh_table.h: tanh by 32 polynomials, for kernels that look up 32 numbers in registers.

Needs mpmath, which PyTorch brings along. Run: python tools/fit_tanh.py > csrc/cpu/tanh_table.h
"""

from __future__ import annotations

import struct

import mpmath as mp
from chebyshev import interpolate

TABLES = {"tanh_table": 5, "rough_tanh_table": 3}  # degrees
LOWEST, BINADES, PARTS = -4, 8, 4  # [2^-4, 2^4), each binade in 4 equal parts
LIMIT = 10.0  # tanh rounds to 1 from 9.02 on


def float32(x: mp.mpf) -> float:
    """x rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", float(x)))[0])


def next_float32(x: float, steps: int) -> float:
    bits = struct.unpack("i", struct.pack("f", x))[0] + steps
    return float(struct.unpack("f", struct.pack("i", bits))[0])


def centre(low: float, high: float) -> float:
    """A point near the middle whose tanh is almost a float32, so that the constant coefficient has no error."""

    def error(x: float) -> mp.mpf:
        value = mp.tanh(mp.mpf(x))
        return abs(float32(value) / value - 1)

    return min((next_float32(float32((low + high) / 2), step) for step in range(-500, 501)), key=error)


def fit(degree: int, low: float, high: float) -> tuple[float, list[float]]:
    """The centre and the coefficients, lowest power first, in powers of x - centre."""
    if low >= LIMIT:
        return low, [1.0] + [0.0] * degree
    first = low == 2.0**LOWEST
    if first:  # everything from 0 on, to a small relative error
        low = 0.0
    at = 0.0 if first else centre(low, high)
    value = mp.tanh(mp.mpf(at))

    def slope(t: mp.mpf) -> mp.mpf:
        return (mp.tanh(at + t) - value) / t if abs(t) > mp.mpf(10) ** -20 else 1 - value**2

    # From 0 on the slope begins with exactly 1, so that tiny x are their own tanh.
    if first:
        higher = interpolate(lambda t: (slope(t) - 1) / t, degree - 2, mp.mpf(0), mp.mpf(high))
        return at, [float32(c) for c in (value, 1, *higher)]
    return at, [float32(c) for c in (value, *interpolate(slope, degree - 1, low - mp.mpf(at), high - mp.mpf(at)))]


def table(degree: int) -> list[list[float]]:
    rows = [[0.0] * (BINADES * PARTS) for _ in range(degree + 2)]
    for binade in range(LOWEST, LOWEST + BINADES):
        for part in range(PARTS):
            low, high = (2.0**binade * (1 + (part + end) / PARTS) for end in (0, 1))
            at, coefficients = fit(degree, low, high)
            index = (127 + binade) % BINADES * PARTS + part
            for row, number in zip(rows, [at, *coefficients], strict=True):
                row[index] = number
    return rows


HEAD = """\
// Written by tools/fit_tanh.py. Row 0: the centres of 32 intervals; the others: the coefficients of tanh there, in
// powers of the distance from the centre. The column of x: the lowest three bits of its exponent, then the highest two
// of its mantissa. Columns repeat outside of the range from the lowest to the limit.
#pragma once

// clang-format off
namespace fused_rnn {
"""


def main() -> None:
    mp.mp.dps = 40
    print(HEAD)
    print(f"inline constexpr float tanh_lowest = {2.0**LOWEST}f, tanh_limit = {LIMIT}f;")
    for name, degree in TABLES.items():
        print(f"\nalignas(64) inline constexpr float {name}[{degree + 2}][{BINADES * PARTS}] = {{")
        for row in table(degree):
            numbers = [f"{number:.9e}f" for number in row]
            for first in range(0, len(row), 4):
                begin, end = "{" if first == 0 else " ", "}," if first + 4 == len(row) else ","
                print(f"    {begin}{', '.join(numbers[first : first + 4])}{end}")
        print("};")
    print("\n}  // namespace fused_rnn")


if __name__ == "__main__":
    main()
