"""Types of command-line arguments, for `argparse`: what is wrong with an argument is said in its own words."""

import argparse
import re
from collections.abc import Callable, Sequence


def choices(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a type for lists of some of the names."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(part.strip() for part in text.split(","))
        for part in chosen:
            if part not in names:
                raise argparse.ArgumentTypeError(f"expected a comma-separated list of {', '.join(names)}, got {text!r}")
        return chosen

    return parse


def pattern(text: str) -> str:
    """Return the text if it is a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from None
    return text


def counts(text: str) -> tuple[int, ...]:
    """Return the whole numbers of a comma-separated list, each once."""
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))


def positive(text: str) -> int:
    """Return the whole number, which is at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number
