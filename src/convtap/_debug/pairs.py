"""Pairs the layers of two sides: by a map, by name or by order."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from convtap._debug.comparison import Run
from convtap._errors import InvalidType, LayerNotFound, did_you_mean, listed
from convtap._select.example import run_once
from convtap._select.module_tree import ModuleTree
from convtap._torch.cleanup import undone
from convtap._torch.hooks import Hooks

# Note: [Fused layers]
# Assumption: fusion folds a BatchNorm, and perhaps a ReLU, into the convolution before it, and leaves an Identity or
#   nothing in its place. The fused layer's output is then that of the last folded module.
# Failure: compared with the convolution of the original model, a correct fusion looks wrong at every layer.
# Choice: one pass of each model shows which BatchNorm and ReLU modules follow a convolution, by the identity of the tensors
#   that they pass on. (The order of definition need not be that of execution.) Modules that follow in one model and not in
#   the other were folded, and the last of them is the partner. A plain Conv1d can hold only a BatchNorm.

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_RELUS = (nn.ReLU, nn.ReLU6)


@dataclass
class Flow:
    """How one model runs: its layers, and the modules that follow each of them.

    Attributes:
        counts: the number of runs of each module by name, in the order of their first runs.
        followers: by run of a layer, the runs and kinds (``"norm"``, ``"relu"``) of the modules that process its output.
        kinds: the class of each module, by name.
    """

    counts: dict[str, int] = field(default_factory=dict)
    followers: dict[Run, list[tuple[Run, str]]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)


def observe(model: nn.Module, layers: Sequence[str], tree: ModuleTree, example: Any, mode: str | None) -> Flow:
    """Runs a model once and follows each layer's output through BatchNorm and ReLU."""
    flow = Flow()
    heads: dict[int, tuple[weakref.ref[Tensor], Run]] = {}
    hooks = Hooks()
    wanted = set(layers)
    with undone([hooks.remove]):
        for name, module in tree.names.items():
            flow.kinds[name] = type(module).__name__
            if name in wanted or isinstance(module, (*_NORMS, *_RELUS, nn.Identity)):
                hooks.after(module, partial(_follow, flow, heads, wanted), name)
        run_once(model, example, mode)
    return flow


def _follow(
    flow: Flow, heads: dict[int, Any], wanted: set[str], name: str, module: Any, args: Any, output: Any
) -> None:
    run = Run(name, flow.counts.get(name, 0))
    flow.counts[name] = run.number + 1
    if not isinstance(output, Tensor):
        return
    if name in wanted:
        flow.followers[run] = []
        heads[id(output)] = (weakref.ref(output), run)
        return
    reference, head = heads.get(id(args[0]) if args else 0, (None, None))
    if reference is None or head is None or reference() is not args[0]:
        return
    if isinstance(module, (*_NORMS, *_RELUS)):
        flow.followers[head].append((run, "norm" if isinstance(module, _NORMS) else "relu"))
    heads[id(output)] = (weakref.ref(output), head)


def folded(layer: Run, flow: Flow, partner: Run, other: Flow) -> Run:
    """Returns the run whose output a fused ``partner`` reproduces.

    This is the layer's own run, or that of the last module that was folded into the partner.
    """
    mine, theirs = flow.followers.get(layer, []), other.followers.get(partner, [])
    gone = len(mine) - len(theirs)
    if gone <= 0 or [kind for _, kind in mine[gone:]] != [kind for _, kind in theirs]:
        return layer
    members = mine[:gone]
    if "ReLU" not in other.kinds.get(partner.layer, ""):
        members = [member for member in members if member[1] == "norm"]
    return members[-1][0] if members else layer


def match(a: Mapping[str, Any], b: Mapping[str, Any], given: Mapping[str, str] | None) -> tuple[dict[str, str], str]:
    """Pairs the layers of two sides.

    ``given`` takes precedence. Other layers are paired by name if all names agree or the structures differ, else by order.

    Args:
        a: the layers of one side in order, each with a value that must be equal for the structures to match.
        b: the layers of the other side.
        given: the user's pairs: names in ``a`` to names in ``b``.

    Returns:
        The pairs, and a note if layers were paired by order.

    Raises:
        InvalidType: ``given`` is not a dict.
        LayerNotFound: ``given`` has a name that a side does not have.
    """
    pairs = _checked(a, b, given)
    left = [name for name in a if name not in pairs]
    taken = set(pairs.values())
    right = {name: None for name in b if name not in taken}
    if set(left) != set(right) and [a[name] for name in left] == [b[name] for name in right]:
        pairs.update(zip(left, right, strict=True))
        return pairs, "paired by order: the names differ, the structures match"
    pairs.update({name: name for name in left if name in right})
    return pairs, ""


def _checked(a: Mapping[str, Any], b: Mapping[str, Any], given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidType(
            f"map is a {type(given).__name__}. Pass a dict from names in a to names in b: map={{'conv1': 'stem.conv'}}."
        )
    for side, names, known in (("a", list(given), a), ("b", list(given.values()), b)):
        for name in names:
            if name not in known:
                raise LayerNotFound(
                    f"map names {name!r}, and side {side} has no such layer. It has {listed(known)}."
                    f"{did_you_mean(str(name), list(known))}"
                )
    return dict(given)


def signature(module: nn.Module) -> Any:
    """Returns the values that must be equal for two layers to be paired by order.

    They are the kind of operation, the channels, the kernel and the stride.
    """
    shape = tuple(str(getattr(module, key, None)) for key in ("in_channels", "out_channels", "kernel_size", "stride"))
    kind = next((base.__name__ for base in type(module).__mro__ if base.__name__ in _KINDS), type(module).__name__)
    return (kind, *shape)


_KINDS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "Linear")
