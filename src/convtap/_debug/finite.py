"""Finds the first module that produces NaN or Inf: the context manager, with its error and its warnings."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Literal

import torch
from torch import nn

from convtap._debug.finding import Finding
from convtap._debug.watch import Watch
from convtap._errors import ConvtapError, InvalidValue, NonFiniteOutput, Unsupported, listed, plural, warn_user
from convtap._public import public
from convtap._select.arguments import check_arguments
from convtap._select.module_tree import ROOT, ModuleTree
from convtap._select.selection import Layers, Types, select
from convtap._torch import compile_stance, modes
from convtap._torch.cleanup import Guard, Spent, undo

# Hooks on these, even ones that do nothing, switch their fast path off, and padded positions then come out different.
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)

# Note: [Hooks on fast paths]
# Assumption: ``nn.TransformerEncoder`` and its parts leave their fast path when they, or modules in them, have hooks.
# Failure: padded positions then come out different, so the block would change what the model computes.
# Choice: in eval mode (in training there is no fast path) they are not watched, unless ``layers`` has their exact name. A
#   NaN that one of them makes is then put down to the code of the module around it, and the message names them.

_RAISE_AT = ("exit", "layer", "never")


@public
class Finite:
    """Finds the first module that produces NaN or Inf from finite inputs, and not the ones that pass it on.

    Every tensor that goes into a module or comes out of one is looked at, and nothing of it is kept but its extremes. On the
    CPU each is judged at once; on an accelerator without waiting for it, and all are read together when the block ends.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import finite
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Conv1d(2, 1, 3))
        >>> with finite(model, raise_at="never") as f:
        ...     y = model(torch.full((1, 1, 16), 1e38) * torch.tensor([10.0]))
        >>> f.first.layer, f.first.where, f.first.what
        ('(root)', 'input', 'Inf')

    Args:
        model: any PyTorch model.
        layers: which modules to watch, as in ``capture``; None for all of ``types``. The model itself is always watched.
        types: the module types to choose from.
        raise_at: ``"exit"``: raise at the end of the block. ``"layer"``: where the layer runs, so that a debugger stops
            there (on an accelerator this waits for every layer). ``"never"``: only fill ``first``.
        backward: also look at the gradients of a backward pass in the block: of what modules take and return, and of their
            parameters.
        inf: whether Inf counts; False for models that mask with −inf.

    Raises:
        NonFiniteOutput: a NaN or Inf was found; where is said by ``raise_at``.
        LayerNotFound: a selector matches nothing.
        Unsupported: the model runs none of its parts as Python modules, so nothing could be told.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        types: Types = nn.Module,
        raise_at: Literal["exit", "layer", "never"] = "exit",
        backward: bool = False,
        inf: bool = True,
    ) -> None:
        self._types = check_arguments(model, layers, types, "run the model inside: with finite(model): model(x)")
        if raise_at not in _RAISE_AT:
            raise InvalidValue(f"raise_at={raise_at!r} is none of {', '.join(map(repr, _RAISE_AT))}.")
        if isinstance(model, torch.jit.ScriptModule):
            raise Unsupported(
                f"this {type(model).__name__} is TorchScript, whose parts call no hooks, so no layer could be named. Pass the "
                "Python model that it was made from."
            )
        self._model = model
        self._layers = layers
        self._raise_at = raise_at
        self._backward = backward
        self._inf = inf
        self._watch: Watch | None = None
        self._steps: list[Callable[[], object]] | None = None
        self._chosen()  # a wrong name is an error here, where it was written

    def _chosen(self) -> tuple[ModuleTree, dict[str, nn.Module], str]:
        """Returns the model's tree, the modules to watch, and a text about what is not watched."""
        selection = select(self._model, self._layers, self._types)
        tree, modules = selection.tree, dict(selection.modules)
        if ROOT in tree.names:
            modules = {ROOT: tree.names[ROOT], **modules}
        hints = []
        if self._layers is not None or not issubclass(nn.Module, self._types):
            hints.append(
                "Modules that layers= and types= leave out were not watched: their doings count as this code's."
            )
        skipped = [name for name in tree.instances(_FAST_PATHS) if not tree.names[name].training]
        for name in skipped:
            inside = set(map(id, tree.names[name].modules()))
            modules = {
                other: module
                for other, module in modules.items()
                if id(module) not in inside or other in selection.exact
            }
        if skipped:
            hints.append(f"Not watched, since hooks would change how they compute: {listed(skipped)}.")
        if not modules:
            raise Unsupported(
                f"in eval mode this {type(self._model).__name__} computes on a fast path, which hooks would switch off, so "
                "nothing of it can be watched. Call model.train() first, or give the exact names of what to watch in layers=."
            )
        scripted = [name for name, module in modules.items() if isinstance(module, torch.jit.ScriptModule)]
        if scripted:
            hints.append(
                f"TorchScript calls no hooks, so the parts of these count as their own code: {listed(scripted)}."
            )
        if tree.compiled:
            hints.append(
                "The compiled model ran eagerly in this block; a NaN that only compiled code makes does not show in it: run "
                "torch.compile(tapped(model, reduce=lambda t: t.isfinite().all())) for that."
            )
        return tree, modules, " ".join(hints)

    def __enter__(self) -> Finite:
        if self._steps is not None:
            raise ConvtapError(
                "this block is open already, and one object holds one. Open a second one with finite(model)."
            )
        tree, modules, hint = self._chosen()
        token = modes.Token()
        root = tree.names.get(ROOT, self._model)
        now = self._raise_at == "layer"
        self._watch = watch = Watch(root, modules, token, inf=self._inf, backward=self._backward, now=now, hint=hint)
        steps: list[Callable[[], object]] = [
            lambda: compile_stance.leave(token),
            lambda: modes.leave(token),
            watch.close,
        ]
        try:
            self._steps = steps
            self._guard = Guard(steps)
            compile_stance.enter(token)
            modes.enter(token)
            watch.open()
        except BaseException:
            self._steps = None
            undo(steps)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        steps = self._steps
        assert steps is not None
        assert self._watch is not None
        try:  # and no call before it
            undo(steps)
        finally:
            undo(steps)  # nothing, unless an interrupt struck. See Note: [Interrupts]
            self._steps = None
            self._guard.__class__ = Spent  # type: ignore[assignment]
        if error is not None:
            return
        first = self._watch.first()
        if first is None:
            self._warn(self._watch)
        elif self._raise_at != "never":
            raise NonFiniteOutput(first.message)

    @property
    def first(self) -> Finding | None:
        """The first NaN or Inf, or None. Reading it inside the block waits for an accelerator."""
        return None if self._watch is None else self._watch.first()

    def _warn(self, watch: Watch) -> None:
        """Warns of what could not be seen; not if nothing ran at all."""
        if not watch.calls and watch.elsewhere:
            text = (
                f"nothing was watched: the model ran in another thread, where this block is not open: "
                f"{listed(watch.elsewhere)}. Enter the block in the thread that runs the model."
            )
        elif self._backward and watch.calls and not watch.gradients:
            text = (
                "backward=True, but no gradient of a layer came in this block. Put loss.backward() inside the block, and run "
                "the model with gradients."
            )
        else:
            return
        warn_user(text)

    def __repr__(self) -> str:
        first = self.first
        if first is not None:
            return f"<finite: {first.message}>"
        calls = 0 if self._watch is None else self._watch.calls
        return f"<finite: no NaN or Inf in {plural(calls, 'call')}>"


finite = Finite
