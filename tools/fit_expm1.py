"""Prints the polynomials of csrc/cells/math.h and csrc/cpu/activations.h, at Chebyshev nodes.

(e^r - 1 - r) / r^2 on two intervals, and 2^r for bfloat16 gates. Needs mpmath, which PyTorch brings along. Run: python
tools/fit_expm1.py
"""

from __future__ import annotations

import mpmath as mp
from chebyshev import interpolate

# r / ln 2. The centred interval has a little room on both sides: r is rounded.
INTERVALS = {"CentredTail": ("-0.50025", "0.50025"), "NegativeTail": ("-1", "0")}

# What it is for, the interval, the degree, the bits of a result.
TAILS = (
    ("float32", "CentredTail", 5, 24),
    ("float64", "CentredTail", 10, 53),
    ("float32 in cpu/activations.h", "CentredTail", 4, 24),
    ("float32", "NegativeTail", 5, 24),
    ("float64", "NegativeTail", 10, 53),
)


def tail(r: mp.mpf) -> mp.mpf:
    return (mp.expm1(r) - r) / r**2 if abs(r) > mp.mpf(10) ** -20 else mp.mpf(1) / 2


def value(coefficients: list[mp.mpf], r: mp.mpf) -> mp.mpf:
    return sum(c * r**power for power, c in enumerate(coefficients))


def show(title: str, degree: int, errors: list[mp.mpf], bits: int, coefficients: list[mp.mpf]) -> None:
    worst = max(errors)
    print(f"{title}: degree {degree}, relative error {mp.nstr(worst, 3)} = {mp.nstr(worst * 2**bits, 2)} ulp")
    for power, c in enumerate(coefficients):
        print(f"  r^{power}  {mp.nstr(c, 20)}")


def main() -> None:
    mp.mp.dps = 60
    for use, interval, degree, bits in TAILS:
        low, high = (mp.mpf(end) * mp.log(2) for end in INTERVALS[interval])
        coefficients = interpolate(tail, degree, low, high)
        points = [low + (high - low) * mp.mpf(k) / 2000 for k in range(2001)]
        errors = [abs((r + r**2 * value(coefficients, r)) / mp.expm1(r) - 1) for r in points if r]
        show(f"{interval}, {use}", degree, errors, bits, coefficients)
    coefficients = interpolate(lambda r: mp.mpf(2) ** r, 4, mp.mpf(0), mp.mpf(1))
    errors = [abs(value(coefficients, mp.mpf(k) / 2000) / mp.mpf(2) ** (mp.mpf(k) / 2000) - 1) for k in range(2001)]
    show("2^r, rough_sigmoid of cpu/activations.h", 4, errors, 8, coefficients)


if __name__ == "__main__":
    main()
