"""Writes the coverage as HTML: the layers that were not captured, and the layer tree of the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from convtap._errors import plural
from convtap._result.coverage import Coverage, LayerCoverage, counts_line
from convtap._select.module_tree import ROOT, ModuleTree
from convtap._view.report.blocks import MOST_UNFOLDED, modules_around, parts_of
from convtap._view.report.page import MAX_ROWS, escape

_SIGNS = {"captured": "●", "not activated": "○", "idle": "○", "bypassed": "✕"}


def coverage_section(coverage: Coverage) -> str:
    """Writes how many layers are in each state, and each layer that was not captured with its reason."""
    missing = [layer for layer in coverage.values() if layer.state != "captured"]
    lines = [f"<p>{escape(counts_line(coverage))}</p>"]
    if len(missing) > MAX_ROWS:
        lines.append(f"<p class='alarm'>The first {MAX_ROWS:,} of {plural(len(missing), 'such layer')}.</p>")
    if missing:
        rows = "".join(
            f"<tr><td>{escape(layer.name)}</td><td class='{style_of(layer)}'>{escape(layer)}</td></tr>"
            for layer in missing[:MAX_ROWS]
        )
        lines.append(f"<div class='wide'><table class='plain'><tbody>{rows}</tbody></table></div>")
    lines.extend(f"<p class='alarm'>{escape(note)}</p>" for note in coverage.notes)
    return "".join(lines)


def layer_tree(coverage: Coverage, model: nn.Module | None) -> str:
    """Writes nested lists, open down to the selected layers, or of many down to blocks of some.

    Without the model only the selected layers are known.
    """
    modules = {} if model is None else ModuleTree(model).names
    kinds = {name: type(module).__name__ for name, module in modules.items()}
    outside = [name for name in coverage if model is not None and not _is_inside(name, kinds)]
    top: dict[str, Any] = {}
    for name in dict.fromkeys([*kinds, *coverage]):
        if name != ROOT and name not in outside:
            node = top
            for part in parts_of(name):
                node = node.setdefault(part, {})
    note = others = ""
    if model is None:
        note = "<p class='hint'>The selected layers only. With model=model this is the whole tree.</p>"
    if outside:
        others = "<p class='soft'>Not under the name of a module or parameter of this model:</p>"
        others += "".join(f"<p>{escape(name)}{_mark(coverage, name)}</p>" for name in outside)
    root = f"{escape(kinds.get(ROOT, 'model'))}{_mark(coverage, ROOT)}"
    below: dict[str, list[LayerCoverage]] = {}
    for layer in coverage.values():
        for module in modules_around(layer.name):
            below.setdefault(module, []).append(layer)
    rows = "".join(_branch(part, part, node, kinds, coverage, below) for part, node in top.items())
    return f'{note}<div class="tree"><details open><summary>{root}</summary>{rows}</details>{others}</div>'


def _is_inside(name: str, kinds: dict[str, str]) -> bool:
    """Returns whether a name is that of a module of the model, or could be that of a parameter of one."""
    return name in kinds or (name != "F.conv1d" and (name.rpartition(".")[0] or ROOT) in kinds)


def _mark(coverage: Coverage, name: str) -> str:
    layer = coverage.get(name)
    return "" if layer is None else f' <span class="{style_of(layer)}">{_SIGNS[layer.state]} {escape(layer)}</span>'


def style_of(layer: LayerCoverage) -> str:
    """Returns the class that the page's style has for the state of a layer."""
    return layer.state.replace(" ", "-")


def _branch(
    part: str,
    name: str,
    node: dict[str, Any],
    kinds: dict[str, str],
    coverage: Coverage,
    below: dict[str, list[LayerCoverage]],
) -> str:
    kind = f' <span class="soft">{escape(kinds[name])}</span>' if name in kinds else ""
    label = f"{escape(part)}{kind}{_mark(coverage, name)}"
    if not node:
        return f"<p>{label}</p>"
    rows = "".join(_branch(child, f"{name}.{child}", inner, kinds, coverage, below) for child, inner in node.items())
    layers = below.get(name, [])
    if layers and len(layers) <= MOST_UNFOLDED < len(coverage):
        return f"<details><summary>{label}{_counts(layers)}</summary>{rows}</details>"
    return f"<details{' open' if layers else ''}><summary>{label}</summary>{rows}</details>"


def _counts(layers: list[LayerCoverage]) -> str:
    """Writes how many of a module's layers are in each state."""
    states = {style_of(layer): layer.state for layer in layers}
    return "".join(
        f' <span class="{style}">{_SIGNS[state]} {sum(layer.state == state for layer in layers):,} {state}</span>'
        for style, state in states.items()
    )
