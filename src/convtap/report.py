"""Writes a self-contained HTML report of a capture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from convtap._atomic_write import write_whole
from convtap._errors import InvalidType, StoreError
from convtap._result.activations import Activations, log_of
from convtap._result.file import unwritable
from convtap._view.outputs import CapturedOutputs, Chosen, checked_count
from convtap._view.report.blocks import MOST_UNFOLDED
from convtap._view.report.coverage import coverage_section, layer_tree
from convtap._view.report.entries import Entries, index
from convtap._view.report.figures import drawn_input, figures
from convtap._view.report.head import head, model_name
from convtap._view.report.page import Section, page
from convtap._view.report.table import labels, statistics_table
from convtap._view.time_axis import TimeAxis


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
    title: str | None = None,
    notes: str | None = None,
) -> None:
    """Writes a self-contained HTML page of coverage, statistics and pictures.

    The head of the page names the model, its mode and device, the number of inputs, the versions and the date. An index with
    a filter stays in view. If the capture has more than 40 layers, they are folded by block, the module that contains them.

    The page makes no network requests, and works in any browser, from disk and on a phone. convtap writes it to a temporary
    file and then renames that, so the file is never incomplete. The report needs no other package.

    Args:
        acts: the outputs of a capture.
        path: the file to write, such as ``"report.html"``. An existing file is overwritten.
        model: the model, to show its whole layer tree. Without it the tree shows only the selected layers.
        sample: the number of the input in the pictures, counted from 0 across all forward passes.
        layers: the layers that have a picture, as in ``plot``. The table always has all layers.
        signal: the model's input, as in ``plot``.
        sample_rate: input samples per second, as in ``plot``.
        timeline: the result of ``convtap.timeline``, as in ``plot``.
        channels: the maximum number of rows of a map.
        channels_last: which outputs are (B, T, C), as in ``plot``.
        title: the heading of the page, instead of the model's class.
        notes: free text below the head, such as a description of the experiment. Line breaks are kept.

    Raises:
        StoreError: the file cannot be written.
        LayerNotFound: ``layers`` matches no captured call.
        OutOfRange: the input does not exist.
        ConvtapError: another argument is invalid (also a TypeError or a ValueError).

    Examples:
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
    target = _checked(acts, path, model)
    for name, text in (("title", title), ("notes", notes)):
        if text is not None and not isinstance(text, str):
            raise InvalidType(f"{name} is a {type(text).__name__}, not text. Pass a string: {name}='…'.")
    rows = checked_count("channels", channels)
    axis = TimeAxis(timeline, sample_rate, has_signal=signal is not None)
    table, drawn, entries = "<p>No outputs were captured.</p>", "<p>The capture has no outputs to draw.</p>", None
    if len(acts):
        outputs = CapturedOutputs(log_of(acts), axis, channels_last)
        found = drawn_input(outputs, sample, layers, signal, rows)
        entries = Entries(outputs, found)
        drawn = figures(found, axis, entries, sample)
        table = statistics_table(outputs, entries, found)
    many = entries is not None and len(entries.items) > MOST_UNFOLDED
    several = entries is not None and len(entries.drawn) > MOST_UNFOLDED
    sections = [
        Section("coverage", "Coverage", coverage_section(acts.coverage)),
        Section("layers", "Layers", table, can_unfold=many),
        Section("pictures", "Pictures", drawn, f' data-unit="{axis.unit}"', can_unfold=several),
        Section("tree", "Layer tree", layer_tree(acts.coverage, model)),
    ]
    name = model_name(acts, model)
    heading = title or (f"{name}: captured outputs" if name else "Captured outputs")
    text = page(heading, head(acts, model, notes), index(sections, entries), sections, labels())
    try:
        write_whole(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise StoreError(unwritable(target, error)) from error


def _checked(acts: Activations, path: str | os.PathLike[str], model: nn.Module | None) -> Path:
    """Checks the arguments, and returns the path of the file to write."""
    if not isinstance(acts, Activations):
        raise InvalidType(
            f"acts is a {type(acts).__name__}, not the result of a capture. Write acts.report('report.html')."
        )
    if model is not None and not isinstance(model, nn.Module):
        raise InvalidType(
            f"model is a {type(model).__name__}, not a torch.nn.Module. Write acts.report('report.html', model=model)."
        )
    try:
        return Path(path)
    except TypeError:
        raise InvalidType(
            f"path is a {type(path).__name__}, not the path of a file. Write acts.report('report.html')."
        ) from None
