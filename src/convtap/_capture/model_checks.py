"""Checks which options of a capture a model supports."""

from __future__ import annotations

from torch import nn

from convtap._capture.options import CaptureOptions
from convtap._errors import Unsupported, listed
from convtap._select.module_tree import ModuleTree
from convtap._select.selection import Selection
from convtap._taps.modules import is_plain
from convtap._torch import compile_stance


def why_eager(options: CaptureOptions, selection: Selection, uses_key: bool) -> str | None:
    """Returns why the compiled parts of a model have to run eagerly, or None."""
    compiled = selection.tree.compiled
    if not compiled:
        return None
    for option, wanted in (
        ("detach=False", not options.policy.detach),
        ("grads=True", options.grads),
        ("inputs=True", options.inputs),
        (f"at={options.at!r}", options.at == "activation"),
        ("functional=False", options.functional is False),
        ("this torch has no convolution key", not uses_key),
        (f"the compiler's stance is {compile_stance.current()!r}", compile_stance.current() != "default"),
        ("CUDA replays its graph", any(map(compile_stance.uses_cuda_graphs, selection.tree.wrappers))),
    ):
        if wanted:
            return option
    selected = {name: module for name, module in selection.modules.items() if name in compiled}
    others = [name for name, m in selected.items() if not is_plain(m) or (options.at == "input" and _pads(m))]
    if others:
        return (
            f"{listed(others)} is not a plain Conv1d" if len(others) == 1 else f"{listed(others)} are not plain Conv1d"
        )
    weights = [id(module.weight) for module in selected.values()]
    return "two layers share one weight" if len(set(weights)) < len(weights) else None


def _pads(module: nn.Module) -> bool:
    return getattr(module, "padding_mode", "zeros") != "zeros"


def check_replicas(tree: ModuleTree) -> None:
    """Raises Unsupported for a wrapper that runs copies of the model in threads."""
    for wrapper in tree.wrappers:
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
            raise Unsupported(
                f"nn.DataParallel on {len(wrapper.device_ids)} devices runs copies of the model, which hooks do not see. "
                "Capture its module on one device, with capture(model.module) as acts: model.module(x), or use "
                "DistributedDataParallel with one process per device."
            )


def check_script(options: CaptureOptions, scripted: list[str]) -> None:
    """Raises Unsupported for options that do not work with TorchScript."""
    for option, wanted, instead in (
        ("detach=False", not options.policy.detach, "where values have no autograd graph. Capture the Python model"),
        ("at='activation'", options.at == "activation", "whose functions convtap does not see. Write at='output'"),
        ("grads=True", options.grads, "where values have no autograd graph. Capture the Python model"),
        ("stop=True", options.stop, "which catches the exception that ends the pass. Remove stop=True"),
    ):
        if wanted and scripted:
            raise Unsupported(f"{option} does not work for layers inside TorchScript ({listed(scripted)}), {instead}.")
