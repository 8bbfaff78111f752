"""Makes compiled models run eagerly while a capture needs their hooks to fire."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from convtap._errors import Unsupported
from convtap._torch import call_shim, dynamo_import
from convtap._torch.lock import Lock
from convtap._torch.references import give_reference

# Note: [The eager stance]
# Assumption: Dynamo asks its process-wide stance at every compiled call; "force_eager" runs the Python code.
# Failure: compiled code silently skips a hook that was added after compilation. If each capture set and restored the
#   stance, overlapping captures would leave it set. Importing Dynamo takes over a second.
# Choice: the process has one set of the captures that need the stance. The first capture sets it and the last one restores
#   it. If Dynamo is not imported yet, an import hook sets the stance after the import.

_DYNAMO = "torch._dynamo"

_INSIDE_COMPILED = (
    "a capture cannot be opened inside a function that is being compiled, because Dynamo would trace its hooks instead of "
    "running them. Open the capture around the compiled call, or compile convtap.tapped(model), which returns "
    "(output, {name: tensor}) and traces with fullgraph=True."
)

_lock = Lock()
_blocks: set[object] = set()
_stance: Any = None


def refuse_inside_compiled() -> None:
    """Raises an error inside a function that Dynamo compiles or runs piece by piece.

    Raises:
        Unsupported: if this code runs inside such a function.
    """
    if torch.compiler.is_compiling():
        raise Unsupported(_INSIDE_COMPILED)
    if _DYNAMO in sys.modules:
        callback = _frame_callback()
        if callback is not None and callback is not False:
            raise Unsupported(_INSIDE_COMPILED)


@cache
def _lends(function: Callable[[], Any]) -> bool:
    """Returns whether a function returns an object without a new reference to it.

    See Note: [References lent by torch].
    """
    one = function()
    before = sys.getrefcount(one)
    more = [function() for _ in range(1000)]
    lent = sys.getrefcount(one) - before < 500  # not 0: other threads may use the same object
    for lender in [one, *more] if lent else []:
        give_reference(lender)
    return lent


def _no_callback() -> None:
    return None


def _frame_callback(asked: int = 0) -> Any:
    """Returns Dynamo's current callback for this thread's functions.

    The callback is None or False if Dynamo does not handle them.

    Args:
        asked: how often torch itself called the getter just before. References that those calls took are returned too.
    """
    from torch._C._dynamo import eval_frame

    function = getattr(eval_frame, "get_eval_frame_callback", _no_callback)
    callback = function()
    for _ in range(asked + 1 if _lends(function) else 0):
        give_reference(callback)
    return callback


def is_compiled(module: nn.Module) -> bool:
    """Returns whether a module is compiled.

    The module, or its ``forward``, may be compiled by ``torch.compile`` or by ``module.compile()``.
    """
    if "torch._dynamo" not in sys.modules:
        return False
    if type(module).__name__ == "OptimizedModule" and type(module).__module__ == "torch._dynamo.eval_frame":
        return type(module.dynamo_ctx).__name__ != "DisableContext"
    if call_shim.compiled_call(module) is not None:
        return True
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def current() -> str:
    """Returns the user's stance: ``"default"`` unless the user set another one."""
    if "torch._dynamo" not in sys.modules:
        return "default"
    from torch._dynamo import eval_frame

    with _lock:
        stance = eval_frame._stance if _stance is None else _stance.prev
    return str(getattr(stance, "stance", "default"))


def uses_cuda_graphs(wrapper: nn.Module) -> bool:
    """Returns whether a compiled model is replayed as a CUDA graph.

    convtap's kernels do not run in a CUDA graph.
    """
    if not any(parameter.is_cuda for parameter in wrapper.parameters()):
        return False
    settings = getattr(getattr(wrapper, "dynamo_ctx", None), "compiler_config", None) or {}
    return bool(settings.get("triton.cudagraphs") or torch._inductor.config.triton.cudagraphs)


def enter(block: object) -> None:
    """Adds a capture that needs the stance, and sets the stance for the first one."""
    with _lock:
        _blocks.add(block)
        if len(_blocks) == 1:
            _force()


def leave(block: object) -> None:
    """Removes a capture, and restores the stance after the last one.

    A second call does nothing. See Note: [Interrupts].
    """
    with _lock:
        _blocks.discard(block)
        if not _blocks:
            _restore()


def _force() -> None:
    global _stance
    if _DYNAMO not in sys.modules:
        dynamo_import.then(_force_now, _force_now)
        return
    from torch._dynamo import eval_frame

    before = getattr(eval_frame, "_stance", None)
    try:
        _stance = torch.compiler.set_stance("force_eager")
    except BaseException:
        if before is not None:  # interrupted after it was set
            eval_frame._set_stance(before)
        raise
    _frame_callback(asked=1)


def _force_now() -> None:
    """Sets the stance once Dynamo has been imported."""
    with _lock:
        if _blocks and _stance is None:
            _force()


def _restore() -> None:
    global _stance
    dynamo_import.never_mind(_force_now)
    if _stance is not None:
        from torch._dynamo import eval_frame

        if getattr(eval_frame, "_stance", _stance.stance) is _stance.stance:  # otherwise another stance was set since
            _stance.__exit__(None, None, None)
            _frame_callback(asked=1)
        _stance = None
