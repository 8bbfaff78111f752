"""Writes the coverage and the layer tree of the model as HTML."""

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
    """Returns the counts of layers by state, and each missing layer's reason."""
    missing = [layer for layer in coverage.values() if layer.state != "captured"]
    lines = [f"<p>{escape(counts_line(coverage))}</p>"]
    if len(missing) > MAX_ROWS:
        lines.append(
            f"<p class='alarm'>Shown: the first {MAX_ROWS:,} of {plural(len(missing), 'layer')} without outputs.</p>"
        )
    if missing:
        rows = "".join(
            f"<tr><td>{escape(layer.name)}</td><td class='{style_of(layer)}'>{escape(layer)}</td></tr>"
            for layer in missing[:MAX_ROWS]
        )
        lines.append(f"<div class='wide'><table class='plain'><tbody>{rows}</tbody></table></div>")
    lines.extend(f"<p class='alarm'>{escape(note)}</p>" for note in coverage.notes)
    return "".join(lines)


def layer_tree(coverage: Coverage, model: nn.Module | None) -> str:
    """Returns nested lists, open down to the selected layers or their blocks.

    Without the model it contains only the selected layers.
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
        note = "<p class='hint'>This tree shows only the selected layers. Pass model=model to show the whole tree.</p>"
    if outside:
        others = "<p class='soft'>Layers without a module or parameter of this name in the model:</p>"
        others += "".join(f"<p>{escape(name)}{_mark(coverage, name)}</p>" for name in outside)
    root = f"{escape(kinds.get(ROOT, 'model'))}{_mark(coverage, ROOT)}"
    below: dict[str, list[LayerCoverage]] = {}
    for layer in coverage.values():
        for module in modules_around(layer.name):
            below.setdefault(module, []).append(layer)
    rows = "".join(_branch(part, part, node, kinds, coverage, below) for part, node in top.items())
    return f'{note}<div class="tree"><details open><summary>{root}</summary>{rows}</details>{others}</div>'


def _is_inside(name: str, kinds: dict[str, str]) -> bool:
    """Returns whether a name is a module of the model, or could be a parameter of one."""
    return name in kinds or (name != "F.conv1d" and (name.rpartition(".")[0] or ROOT) in kinds)


def _mark(coverage: Coverage, name: str) -> str:
    layer = coverage.get(name)
    return "" if layer is None else f' <span class="{style_of(layer)}">{_SIGNS[layer.state]} {escape(layer)}</span>'


def style_of(layer: LayerCoverage) -> str:
    """Returns the CSS class for the state of a layer."""
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
    """Returns the number of a module's layers in each state, as HTML."""
    states = {style_of(layer): layer.state for layer in layers}
    return "".join(
        f' <span class="{style}">{_SIGNS[state]} {sum(layer.state == state for layer in layers):,} {state}</span>'
        for style, state in states.items()
    )
