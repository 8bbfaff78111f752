"""A matplotlib figure that shows itself in a notebook without pyplot, and so without its global state."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A plain matplotlib Figure, but that a notebook shows it as the last value of a cell, pyplot imported or not.

    No backend is chosen and nothing is registered anywhere: it is freed like any other object.
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
