"""Command line: `python -m fused_rnn info | check | bench | demo`, each with options of its own (`... info --help`)."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "info": "versions, how fused_rnn was built, instruction sets, threads, CUDA; what is off and why",
    "check": "compare the kernels with the reference on this machine",
    "bench": "time the kernels against torch.nn on this machine",
    "demo": "list the examples, or run one",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command that `argv` (by default the program's arguments) names and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn",
        description=__doc__.split("\n")[0],
        epilog="\n".join(f"  {name:8}{purpose}" for name, purpose in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    # Whatever follows the name, --help included, belongs to the command's own parser.
    arguments = sys.argv[1:] if argv is None else argv
    command = parser.parse_args(arguments[:1]).command
    return importlib.import_module(f"fused_rnn.{command}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
