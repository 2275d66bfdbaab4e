"""Text from elsewhere, made safe to be shown."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    """Return `text` with everything that is not a visible character escaped.

    A message from elsewhere must not move the cursor, set the title or answer for the person at the terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
