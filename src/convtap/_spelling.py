"""Spells characters that a terminal's encoding lacks."""

from __future__ import annotations

import sys
import unicodedata

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
    **dict(
        zip(
            "±…≤≥≠←∞‖√ε°ß", ("+/-", "...", "<=", ">=", "!=", "<-", "inf", "||", "sqrt", "eps", "deg", "ss"), strict=True
        )
    ),
}


def spelled(sign: str) -> str:
    """Returns a character in ASCII, such as ``x`` for ×, or its escape code."""
    if unicodedata.combining(sign):  # the accent of a decomposed letter
        return ""
    plain = "".join(_SPELLED.get(part, part) for part in unicodedata.normalize("NFKD", _SPELLED.get(sign, sign)))
    return plain.encode("ascii", "ignore").decode() or sign.encode("ascii", "backslashreplace").decode()


def printable(text: str) -> str:
    """Returns a text that ``print`` can write to standard output.

    On Windows a redirected output is in cp1252, which lacks characters of the tables. There ``print`` would raise
    UnicodeEncodeError. A character that the encoding has stays as it is.
    """
    if text.isascii():
        return text
    encoding = getattr(sys.stdout, "encoding", None)
    if not isinstance(encoding, str):  # not a file, such as StringIO
        return text
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(sign if _has(encoding, sign) else spelled(sign) for sign in text)
    except LookupError:  # an encoding that Python does not know
        pass
    return text


def _has(encoding: str, sign: str) -> bool:
    try:
        sign.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
