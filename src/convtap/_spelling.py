"""Spells characters that a terminal's encoding lacks."""

from __future__ import annotations

import codecs
import sys
import unicodedata
from typing import TypeVar

_T = TypeVar("_T")

#: The ASCII spelling of characters that Unicode does not decompose.
_SPELLED = {
    **dict.fromkeys("–—−‐‑", "-"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("→↦", "->"),
    **dict.fromkeys("·∙•", "*"),
    **dict.fromkeys("●○", "o"),
    **dict.fromkeys("×✕", "x"),
    **dict.fromkeys("µμ", "u"),
    **dict(zip("±…≤≥≠←∞‖√ε°", ("+/-", "...", "<=", ">=", "!=", "<-", "inf", "||", "sqrt", "eps", "deg"), strict=True)),
}


def spelled(sign: str) -> str:
    """Returns a character in ASCII, such as ``x`` for ×, or its escape code."""
    if sign not in _SPELLED and unicodedata.category(sign)[0] in "LM":  # two letters must not look alike
        return sign.encode("ascii", "backslashreplace").decode()
    plain = "".join(_SPELLED.get(part, part) for part in unicodedata.normalize("NFKD", _SPELLED.get(sign, sign)))
    return plain.encode("ascii", "ignore").decode() or sign.encode("ascii", "backslashreplace").decode()


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(spelled, error.object[error.start : error.end])), error.end


#: The error handler of an encoding that spells what the encoding lacks.
HANDLER = "convtap.spelled"
codecs.register_error(HANDLER, _spell)


def printable(text: str) -> str:
    """Returns a text that ``print`` can write to standard output.

    On Windows a redirected output is in cp1252, which lacks characters of the tables. There ``print`` would raise
    UnicodeEncodeError. A character that the encoding has stays as it is.
    """
    encoding = getattr(sys.stdout, "encoding", None)
    if text.isascii() or not isinstance(encoding, str):  # StringIO has no encoding
        return text
    try:
        return text.encode(encoding, HANDLER).decode(encoding)
    except LookupError:  # an encoding that Python does not know
        return text


def is_utf8(text: str) -> bool:
    """Returns whether a text can be written in UTF-8, unlike some file names."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable_repr(kind: type[_T]) -> type[_T]:
    """Gives a class a ``repr`` that ``print`` can write."""
    plain = kind.__repr__

    def shown(self: _T) -> str:
        return printable(plain(self))

    kind.__repr__ = shown  # type: ignore[method-assign, assignment]
    return kind
