"""One HTML page that holds a whole capture: coverage, statistics, pictures and the layer tree. It needs nothing but itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from convtap._atomic_write import write_whole
from convtap._errors import InvalidType, StoreError, plural
from convtap._result.coverage import counts_line
from convtap._result.file import unwritable
from convtap._table import human_bytes
from convtap._view import gallery as _gallery
from convtap._view.cells import STEPS, palette
from convtap._view.choose import Chosen
from convtap._view.gallery import Gallery
from convtap._view.outline import layer_tree
from convtap._view.page import escape, page
from convtap._view.report_table import MAX_ROWS, statistics_table

if TYPE_CHECKING:
    from convtap._result.activations import Activations


def report(
    acts: Activations,
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    sample: int = 0,
    layers: Chosen = None,
    signal: Any = None,
    sample_rate: float | None = None,
    timeline: Any = None,
    channels: int = 64,
    channels_last: bool | Chosen = None,
) -> None:
    """Writes one self-contained HTML page: what was captured and what was not, statistics, pictures, the layer tree.

    The page loads nothing from anywhere, and works in any browser, from disk and on a phone. It is written under a
    temporary name and then renamed, so that a file of this name is always whole. It needs no other package.

    Args:
        acts: what a block collected.
        path: the file to write, such as ``"report.html"``; one that is there is replaced.
        model: the model, to show its whole layer tree; without it the tree has the selected layers only.
        sample: which input the pictures show, numbered from 0 through all forward passes.
        layers: which layers have a picture, as in ``plot``. The table has all.
        signal: the model's input, as in ``plot``.
        sample_rate: input samples a second, as in ``plot``.
        timeline: what ``convtap.timeline`` gives, as in ``plot``.
        channels: the most rows of a map.
        channels_last: which outputs are (B, T, C), as in ``plot``.

    Raises:
        StoreError: the file cannot be written.
        LayerNotFound: ``layers`` means nothing that is here.
        OutOfRange: there is no such input.
        ConvtapError: another argument cannot be used (then it is a TypeError or a ValueError as well).

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from convtap import capture
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3))
        >>> with capture(model) as acts:
        ...     y = model(torch.zeros(2, 1, 50))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     acts.report(f"{folder}/report.html", model=model)
    """
    if model is not None and not isinstance(model, nn.Module):
        raise InvalidType(f"model is a {type(model).__name__}, not a torch.nn.Module: report(path, model=model).")
    try:
        target = Path(path)
    except TypeError:
        raise InvalidType(
            f"path is a {type(path).__name__}, and it must name a file: acts.report('report.html')."
        ) from None
    gallery = Gallery(acts, sample, layers, signal, sample_rate, timeline, channels, channels_last)
    title = "What convtap captured" if model is None else f"{type(model).__name__}: what convtap captured"
    sections = [
        ("coverage", "Coverage", _coverage(acts)),
        ("layers", "Layers", statistics_table(acts, gallery.orientation) if len(acts) else _NOTHING),
        ("pictures", "Pictures", _legend() + gallery.html() if len(acts) else "<p>There is nothing to draw.</p>"),
        ("tree", "Layer tree", layer_tree(acts.coverage, model)),
    ]
    lead = f"<p>{escape(plural(len(acts), 'call'))}, {escape(human_bytes(acts.nbytes))}</p>"
    text = page(title, sections, lead)
    try:
        write_whole(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise StoreError(unwritable(target, error)) from error


_NOTHING = "<p>No outputs were captured.</p>"


def _coverage(acts: Activations) -> str:
    coverage = acts.coverage
    missing = [layer for layer in coverage.values() if layer.state != "captured"]
    lines = [f"<p>{escape(counts_line(coverage))}</p>"]
    if missing:
        rows = "".join(
            f"<tr><td>{escape(layer.name)}</td><td class='{layer.state}'>{escape(layer)}</td></tr>"
            for layer in missing[:MAX_ROWS]
        )
        if len(missing) > MAX_ROWS:
            lines.append(f"<p class='alarm'>The first {MAX_ROWS:,} of {plural(len(missing), 'such layer')}.</p>")
        lines.append(f"<div class='wide'><table class='plain'><tbody>{rows}</tbody></table></div>")
    lines.extend(f"<p class='alarm'>{escape(note)}</p>" for note in coverage.notes)
    return "".join(lines)


def _legend() -> str:
    stops = ", ".join("#{:02x}{:02x}{:02x}".format(*rgb) for rgb in palette()[: 2 * STEPS + 1 : 8])
    return (
        f'<p class="soft">−limit <span class="legend" style="background: linear-gradient(to right, {stops})"></span> +limit, '
        f"white at zero. {escape(_gallery.EXPLANATION)}</p>"
    )
