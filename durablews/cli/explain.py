"""`durablews explain`: why a rule of `durablews check` is one."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from functools import partial
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "explain",
        help="say why a finding of check is one",
        description="Say what a rule of `durablews check` looks at: why it matters, the arithmetic, and the source.",
    )
    parser.add_argument("code", metavar="CODE", nargs="+", help="such as DWS202")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print each rule."""
    from durablews.analysis.reports import explained
    from durablews.analysis.rules.catalogue import rule_named

    columns = min(shutil.get_terminal_size((100, 24)).columns, 100)
    texts = [explained(rule_named(code)) for code in args.code]
    paragraphs = [paragraph for text in texts for paragraph in text.strip().split("\n\n")]
    # An address or a flag that is cut in two can be neither searched for nor copied.
    fill = partial(textwrap.fill, width=columns, break_long_words=False, break_on_hyphens=False)
    print("\n\n".join(fill(paragraph) for paragraph in paragraphs))
    return 0
