"""`durablews demo`: the promise, shown in 20 seconds."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser("demo", help="show the promise in 20 seconds, on this machine alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Not written yet."""
    raise NotImplementedError
