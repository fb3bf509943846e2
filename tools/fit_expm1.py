"""Prints the polynomials of csrc/cells/math.h: (e^r - 1 - r) / r^2 on two intervals, at Chebyshev nodes.

Needs mpmath, which PyTorch brings along. Run: python tools/fit_expm1.py
"""

import mpmath as mp

DEGREES = {"float32": (5, 24), "float64": (10, 53)}


# r / ln 2. The centred interval has a little room on both sides: r is rounded.
INTERVALS = {"CentredTail": ("-0.50025", "0.50025"), "NegativeTail": ("-1", "0")}


def fit(degree: int, low: mp.mpf, high: mp.mpf) -> tuple[list[mp.mpf], mp.mpf]:
    """Coefficients, lowest power first, and the largest relative error of r + r^2 q(r) against e^r - 1."""

    def target(r):
        return (mp.expm1(r) - r) / r**2 if abs(r) > mp.mpf(10) ** -20 else mp.mpf(1) / 2

    count = degree + 1
    middle, half = (low + high) / 2, (high - low) / 2
    nodes = [middle + half * mp.cos(mp.pi * (2 * k + 1) / (2 * count)) for k in range(count)]
    powers = mp.matrix(count, count)
    values = mp.matrix(count, 1)
    for row, r in enumerate(nodes):
        values[row] = target(r)
        for power in range(count):
            powers[row, power] = r**power
    coefficients = list(mp.lu_solve(powers, values))

    def error(r):
        q = sum(c * r**power for power, c in enumerate(coefficients))
        return abs((r + r**2 * q) / mp.expm1(r) - 1) if r else mp.mpf(0)

    return coefficients, max(error(low + (high - low) * mp.mpf(k) / 2000) for k in range(2001))


def main() -> None:
    mp.mp.dps = 60
    for name, interval in INTERVALS.items():
        low, high = (mp.mpf(end) * mp.log(2) for end in interval)
        for dtype, (degree, mantissa) in DEGREES.items():
            coefficients, error = fit(degree, low, high)
            ulp = mp.nstr(error * 2**mantissa, 2)
            print(f"{name}, {dtype}: degree {degree}, relative error {mp.nstr(error, 3)} = {ulp} ulp")
            for power, c in enumerate(coefficients):
                print(f"  r^{power}  {mp.nstr(c, 20)}")


if __name__ == "__main__":
    main()
