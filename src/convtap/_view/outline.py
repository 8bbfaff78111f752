"""The layer tree of a model as HTML, with what became of each selected layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from convtap._result.coverage import Coverage
from convtap._select.module_tree import ROOT, ModuleTree
from convtap._view.page import escape

_Node = dict[str, Any]


def layer_tree(coverage: Coverage, model: nn.Module | None) -> str:
    """Nested lists: open where a selected layer is, closed elsewhere. Without the model only the selected layers are known."""
    kinds: dict[str, str] = {}
    if model is not None:
        kinds = {name: type(module).__name__ for name, module in ModuleTree(model).names.items()}
    outside = [name for name in coverage if model is not None and name not in kinds and _owner(name, kinds) is None]
    top: _Node = {}
    for name in dict.fromkeys([*kinds, *coverage]):
        if name != ROOT and name not in outside:
            node = top
            for part in name.split(".") if name != "F.conv1d" else [name]:
                node = node.setdefault(part, {})
    root = kinds.get(ROOT, "model")
    mark = _mark(coverage, ROOT)
    rows = "".join(_branch(part, part, node, kinds, coverage) for part, node in top.items())
    note = (
        ""
        if model is not None
        else "<p class='soft'>The selected layers only. With model=model this is the whole tree.</p>"
    )
    others = "".join(f"<p>{escape(name)}{_mark(coverage, name)}</p>" for name in outside)
    if others:
        others = f"<p class='soft'>Not under the name of a module or parameter of this model:</p>{others}"
    return (
        f'{note}<div class="tree"><details open><summary>{escape(root)}{mark}</summary>{rows}</details>{others}</div>'
    )


def _owner(name: str, kinds: Mapping[str, str]) -> str | None:
    """The module that a parameter of this name would belong to, or None."""
    stem = name.rpartition(".")[0] or ROOT
    return stem if stem in kinds and name != "F.conv1d" else None


def _mark(coverage: Coverage, name: str) -> str:
    layer = coverage.get(name)
    if layer is None:
        return ""
    sign = {"captured": "●", "idle": "○", "bypassed": "✕"}[layer.state]
    return f' <span class="{layer.state}">{sign} {escape(layer)}</span>'


def _branch(part: str, name: str, node: _Node, kinds: Mapping[str, str], coverage: Coverage) -> str:
    kind = f' <span class="soft">{escape(kinds[name])}</span>' if name in kinds else ""
    label = f"{escape(part)}{kind}{_mark(coverage, name)}"
    if not node:
        return f"<p>{label}</p>"
    rows = "".join(_branch(child, f"{name}.{child}", below, kinds, coverage) for child, below in node.items())
    opened = " open" if any(layer.startswith(name + ".") for layer in coverage) else ""
    return f"<details{opened}><summary>{label}</summary>{rows}</details>"
