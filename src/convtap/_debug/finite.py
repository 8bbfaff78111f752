"""The public context manager ``finite``."""

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

# A hook on these, even one that does nothing, switches off their fast path, and padded positions then get other values.
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)

# Note: [Hooks on fast paths]
# Assumption: ``nn.TransformerEncoder`` and its parts leave their fast path when they, or modules in them, have hooks.
# Failure: padded positions then get other values, so watching would change the model's results.
# Choice: in eval mode they are not watched, unless ``layers`` has their exact name. (Train mode has no fast path.) A NaN
#   that one of them produces is then attributed to the code of the module around it, and the message names them.

_RAISE_AT = ("exit", "layer", "never")


@public
class Finite:
    """Finds the first module that produces NaN or Inf from finite inputs.

    Open it in a ``with`` statement and run the model inside. Modules that only pass on a NaN or Inf are not reported.

    convtap probes every tensor that a module takes or returns, and keeps only its extremes. On the CPU it judges each tensor
    at once. On an accelerator it does not wait, and reads all extremes together when the ``with`` statement ends.

    Examples:
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
        layers: the modules to watch, as in ``capture``; None for all of ``types``. The model itself is always watched.
        types: the module types that selectors choose from.
        raise_at: when to raise: at the ``"exit"`` of the ``with`` statement; in the ``"layer"`` that produced the value, so
            that a debugger stops there (on an accelerator this waits for every layer); or ``"never"``, to read ``first``.
        backward: whether to also probe the gradients of a backward pass inside: those of modules' inputs and outputs, and of
            parameters.
        inf: whether Inf counts. Pass False for models that mask with −inf.

    Raises:
        NonFiniteOutput: a NaN or Inf was found, unless ``raise_at="never"``.
        LayerNotFound: a selector matches no module.
        InvalidValue: ``raise_at`` is invalid.
        Unsupported: convtap cannot watch the modules of the model, as in TorchScript.
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
            raise InvalidValue(f"raise_at={raise_at!r} is invalid. Pass one of {', '.join(map(repr, _RAISE_AT))}.")
        if isinstance(model, torch.jit.ScriptModule):
            raise Unsupported(
                f"this {type(model).__name__} is TorchScript, whose submodules call no hooks. Pass the Python model that it "
                "was made from."
            )
        self._model = model
        self._layers = layers
        self._raise_at = raise_at
        self._backward = backward
        self._inf = inf
        self._watch: Watch | None = None
        self._steps: list[Callable[[], object]] | None = None
        self._chosen()  # a wrong name fails here, at the user's line

    def _chosen(self) -> tuple[ModuleTree, dict[str, nn.Module], str]:
        """Returns the model's tree, the modules to watch and a text about the others."""
        selection = select(self._model, self._layers, self._types)
        tree, modules = selection.tree, dict(selection.modules)
        if ROOT in tree.names:
            modules = {ROOT: tree.names[ROOT], **modules}
        hints = []
        if self._layers is not None or not issubclass(nn.Module, self._types):
            hints.append(
                "Modules that layers= and types= exclude were not watched, so they count as code of the module around them."
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
            hints.append(f"Not watched, since hooks would change their results: {listed(skipped)}.")
        if not modules:
            raise Unsupported(
                f"this {type(self._model).__name__} runs on a fast path in eval mode, which hooks would switch off. Call "
                "model.train() first, or pass the exact names of the modules to watch: layers=['name']."
            )
        scripted = [name for name, module in modules.items() if isinstance(module, torch.jit.ScriptModule)]
        if scripted:
            hints.append(
                f"TorchScript calls no hooks, so the submodules of these count as their own code: {listed(scripted)}."
            )
        if tree.compiled:
            hints.append(
                "The compiled model ran eagerly here, so a NaN that only compiled code produces does not show. To find such "
                "a NaN, run torch.compile(tapped(model, reduce=lambda t: t.isfinite().all()))."
            )
        return tree, modules, " ".join(hints)

    def __enter__(self) -> Finite:
        if self._steps is not None:
            raise ConvtapError(
                "this finite(model) is already open, and it cannot be opened twice. Open a second one with finite(model)."
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
        try:  # without a call before it. See Note: [Interrupts]
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
        """The first NaN or Inf, or None.

        Inside the ``with`` statement, reading it waits for an accelerator.
        """
        return None if self._watch is None else self._watch.first()

    def _warn(self, watch: Watch) -> None:
        """Warns if the model ran in another thread, or if no gradient was seen."""
        if not watch.calls and watch.elsewhere:
            text = (
                f"finite(model) watched nothing, since the model ran in another thread, in which it is not open: "
                f"{listed(watch.elsewhere)}. Open it in the thread that runs the model."
            )
        elif self._backward and watch.calls and not watch.gradients:
            text = (
                "backward=True, but finite(model) saw no gradient of a layer. Call loss.backward() inside it, and run the "
                "model with gradients."
            )
        else:
            return
        warn_user(text)

    def __repr__(self) -> str:
        first = self.first
        if first is not None:
            return f"<finite: {first}>"
        calls = 0 if self._watch is None else self._watch.calls
        return f"<finite: no NaN or Inf in {plural(calls, 'call')}>"


finite = Finite
