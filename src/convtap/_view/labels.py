"""Writes layer names so that a person can read them: nothing invisible, and no longer than there is room."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text in which nothing is invisible: line breaks, control and direction characters are written as escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def shortened(text: str, most: int) -> str:
    """Printable text of at most so many characters, with its middle left out."""
    text = printable(text)
    if len(text) <= most:
        return text
    head = most // 3
    return f"{text[:head]}…{text[len(text) - (most - head - 1) :]}"


def counted(bad: tuple[int, int]) -> str:
    """Writes how many values are NaN and how many Inf, or nothing where there are none."""
    return ", ".join(f"{count:,} {name}" for count, name in zip(bad, ("NaN", "Inf"), strict=True) if count)
