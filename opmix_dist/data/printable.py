"""Text of documents on its way to a terminal."""

from __future__ import annotations

import unicodedata

# What moves a cursor, reverses the line (bidirectional marks), is half a character, or none.
_ESCAPED = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
_KEPT = {"\n", "\t", "\u200c", "\u200d"}  # the joiners are letters' business, in Persian and in emoji


def printable(text: str) -> str:
    r"""``text`` with everything escaped that could drive a terminal: ``\x1b[2J`` clears no screen.

    Line feeds and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_printable, text))


def first_words(text: str, most: int = 60) -> str:
    """The beginning of ``text`` on one line of at most ``most`` characters, printable."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def _printable(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _ESCAPED:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
