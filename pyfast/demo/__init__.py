"""``python -m pyfast demo``: a stock GPT with torch's optimizer against the same GPT after
``pyfast.patch`` and ``pyfast.patch_optimizer``, on real text.

Both learn the same bytes from the same initial weights, step by step in turns. The demo shows that
they learn equally well, and which is faster.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

from .options import Options, UsageError, add_arguments

__all__ = ["add_arguments", "main"]


def main(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        arguments: the options that :func:`add_arguments` defines.

    Returns:
        The exit status: 0, or 1 where the two models do not agree or do not learn, or 2 for a
        wrong option or a missing package, with one line on stderr.
    """
    packages = ("matplotlib", "rich")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"{' and '.join(missing)} not found: pip install 'pyfast[demo]'")
    from .data import load_corpus
    from .processes import joined, launch
    from .run import run

    try:
        options = Options.from_arguments(arguments)
        corpus = load_corpus(options.text, options.context)
    except UsageError as error:
        return _refuse(str(error))
    if options.nproc > 1:
        return launch(options)
    with joined(options) as options:
        return run(options, corpus)


def _refuse(text: str) -> int:
    print(f"pyfast demo: {text}", file=sys.stderr)
    return 2
