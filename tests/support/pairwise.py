"""All-pairs designs: every pair of levels of two factors is in some row, in far fewer rows than the full product."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def _always(row: Row) -> bool:
    return True


def pairwise(
    factors: Mapping[str, Sequence[Any]],
    *,
    seed: int = 0,
    allowed: Callable[[Row], bool] = _always,
    candidates: int = 100,
) -> list[Row]:
    """Greedy cover of all pairs of levels; the same rows for the same seed on every machine.

    Args:
        factors: levels of each factor.
        seed: of the private generator that proposes rows.
        allowed: False for a row that makes no sense; a pair that no allowed row can hold is left out.
        candidates: random rows weighed up for each row taken. More make a slightly shorter design.
    """
    rng = random.Random(seed)
    names = list(factors)
    open_pairs = {
        (first, i, second, j)
        for first, second in itertools.combinations(names, 2)
        for i in range(len(factors[first]))
        for j in range(len(factors[second]))
    }

    def levels_to_row(levels: Mapping[str, int]) -> Row:
        return {name: factors[name][levels[name]] for name in names}

    def pairs_of(levels: Mapping[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, levels[a], b, levels[b]) for a, b in itertools.combinations(names, 2)}

    rows = []
    while open_pairs:
        # sorted: the order of a set of strings changes with PYTHONHASHSEED
        first, i, second, j = rng.choice(sorted(open_pairs))
        best: tuple[int, dict[str, int]] | None = None
        for _ in range(candidates):
            levels = {name: rng.randrange(len(factors[name])) for name in names} | {first: i, second: j}
            if not allowed(levels_to_row(levels)):
                continue
            gain = len(pairs_of(levels) & open_pairs)
            if best is None or gain > best[0]:
                best = gain, levels
        if best is None:
            open_pairs.remove((first, i, second, j))
            continue
        open_pairs -= pairs_of(best[1])
        rows.append(levels_to_row(best[1]))
    return rows
