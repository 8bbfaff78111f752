"""Draws one-hot sequences as coloured letters, or as cells if they are long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from convtap._errors import Unsupported
from convtap._view import draw
from convtap._view.cells import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The colours of sequence logos for A, C, G, T and U.
_BASES = {"A": "#1a7f37", "C": "#17589f", "G": "#c98a00", "T": "#a8202e", "U": "#a8202e"}
#: The number of colours that other alphabets use, in the order of their letters.
_MOST_COLOURS = 20
#: The colour of samples outside the signal.
OUTSIDE = "#e3e7eb"
#: The minimum and maximum width of a letter in pixels.
_NARROWEST, WIDEST = 7, 18


def draw_letters(axes: Axes, windows: list[Array], insides: list[Array], letters: str) -> None:
    """Draws (C, W) windows, one per row.

    Samples outside the signal are grey. A position without a letter is a dot.
    """
    from matplotlib.colors import to_rgb

    length = len(insides[0])
    fits = length * _NARROWEST <= axes.get_window_extent().width
    if not fits and len(letters) > _MOST_COLOURS:
        raise Unsupported(
            f"windows of {length} samples have no room for letters, and {len(letters)} letters need more colours than "
            f"{_MOST_COLOURS}. Remove letters to draw maps."
        )
    image = np.ones((len(windows), length, 3))
    for row, (values, inside) in enumerate(zip(windows, insides, strict=True)):
        image[row, ~inside] = to_rgb(OUTSIDE)
        known = inside & (values.sum(axis=0) == 1) & (values.max(axis=0) == 1)
        for position in np.flatnonzero(inside):
            number = int(values[:, position].argmax())
            letter = letters[number] if known[position] else "·"
            colour = _colour(letters, number) if known[position] else draw.INK
            if fits:
                style: dict[str, Any] = {
                    "ha": "center",
                    "va": "center",
                    "fontsize": 8,
                    "weight": "bold",
                    "family": "monospace",
                }
                axes.text(float(position), row, letter, color=colour, parse_math=False, **style)
            elif known[position]:
                image[row, position] = to_rgb(colour)
    axes.imshow(image, aspect="auto", interpolation="nearest")
    axes.set_yticks([])
    draw.whole_ticks(axes, length)
    if not fits:
        for number, letter in enumerate(letters):
            place = (1.0, 1.0)
            offset = (-10 * (len(letters) - 1 - number), 3)
            style = {"xytext": offset, "textcoords": "offset points", "ha": "right", "fontsize": 8, "weight": "bold"}
            axes.annotate(letter, place, xycoords="axes fraction", color=_colour(letters, number), **style)


def _colour(letters: str, number: int) -> Any:
    from matplotlib import colormaps

    is_bases = set(letters.upper()) <= {*_BASES, "N"}
    return _BASES.get(letters[number].upper(), draw.INK) if is_bases else colormaps["tab20"](number % _MOST_COLOURS)
