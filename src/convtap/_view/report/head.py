"""Writes the head of the report: model, mode, device, inputs, versions and dates."""

from __future__ import annotations

import time

from torch import nn

from convtap._errors import Unsupported, plural
from convtap._result.activations import Activations, log_of
from convtap._result.origin import Origin, class_name, date_text, versions
from convtap._result.samples import Samples
from convtap._table import human_bytes
from convtap._tensors.statistics import dtype_text
from convtap._view.report.page import escape, escaped_lines


def model_name(acts: Activations, model: nn.Module | None) -> str:
    """Returns the class name of the captured model or of ``model``, or ``""``."""
    origin = log_of(acts).origin
    if origin is not None and origin.models:
        return ", ".join(origin.models)
    return "" if model is None else class_name(model)


def head(acts: Activations, model: nn.Module | None, notes: str | None) -> str:
    """Returns the facts about the capture, and the notes below them."""
    origin = log_of(acts).origin or Origin()
    written, present = date_text(time.time()), versions()
    facts = {
        "Model": model_name(acts, model),
        "Mode": " and ".join(origin.modes),
        "Device": ", ".join(origin.devices),
        "Data type": ", ".join(dict.fromkeys(dtype_text(call.dtype) for call in acts.calls() if call.dtype)),
        "Inputs": _inputs(acts),
        "Outputs": f"{len(acts):,}, {human_bytes(acts.nbytes)}",
        "Captured": ", ".join(origin.dates + origin.versions),
        "Report written": written if origin.versions == [present] else f"{written}, {present}",
    }
    rows = [f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items() if text]
    text = "" if not notes else f'<p class="notes">{escaped_lines(notes)}</p>'
    return f'<dl class="facts">{"".join(rows)}</dl>{text}'


def _inputs(acts: Activations) -> str:
    """Returns the number of inputs and passes, and the shape of the model's input."""
    samples = Samples(log_of(acts))
    passes = samples.passes
    if not passes:
        return ""
    shapes = list(dict.fromkeys(found.shape for found in passes if found.shape is not None))
    shape = f" of shape {shapes[0]}" if len(shapes) == 1 else ""
    count = plural(len(passes), "forward pass")
    try:
        return f"{plural(samples.count, 'input')} in {count}{shape}"
    except Unsupported:  # the rows may not be inputs
        return f"{count}{shape}"
