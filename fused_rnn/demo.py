"""Lists and runs the examples: ``python -m fused_rnn demo``, ``python -m fused_rnn demo imdb --sample``.

They stand in the folder ``examples`` of the source, not in a wheel.
"""

from __future__ import annotations

import argparse
import ast
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def examples(folder: Path = EXAMPLES) -> dict[str, Path]:
    """The programs in a folder by name."""
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def purpose_of(path: Path) -> str:
    """The first line of a program's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def main(argv: list[str] | None = None) -> int:
    """Runs the example that `argv` names with the arguments behind its name, and returns its exit status."""
    found = examples()
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn demo",
        description="Run an example; without a name list them.",
        epilog="what follows the name belongs to the example: python -m fused_rnn demo imdb --help",
    )
    parser.add_argument("name", nargs="?", choices=list(found) or None, metavar="name")
    arguments = sys.argv[2:] if argv is None else argv
    name = parser.parse_args(arguments[:1]).name
    if not found:
        print(f"demo: the examples are part of the source, not of the wheel; there is no {EXAMPLES}", file=sys.stderr)
        return 2
    if name is None:
        width = max(map(len, found))
        for known, path in found.items():
            print(f"  {known:{width}}  {purpose_of(path)}")
        return 0
    before = sys.argv, list(sys.path)
    sys.argv, sys.path[0] = [str(found[name]), *arguments[1:]], str(EXAMPLES)
    try:
        runpy.run_path(str(found[name]), run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv, sys.path[:] = before
    return 0
