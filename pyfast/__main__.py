"""``python -m pyfast info | demo | bench``."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    from . import _bench, _info, demo

    parser = argparse.ArgumentParser(prog="pyfast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module, text in (
        ("info", _info, "what is usable on this machine and why not, with a self-test"),
        ("demo", demo, "train a small model on real text, stock and patched, side by side"),
        ("bench", _bench, "measure the ops against torch on this machine"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    arguments = parser.parse_args(argv)
    status: int = arguments.main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
