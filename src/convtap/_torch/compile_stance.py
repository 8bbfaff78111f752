"""Makes compiled models run eagerly for a capture that needs their hooks to fire."""

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
# Failure: a hook added after compilation is silently skipped; set and restored by each capture, the stance of overlapping
#   captures would stay on; importing Dynamo takes over a second.
# Choice: one count of the captures that need it for the process: the first one sets the stance and the last one restores
#   it. While Dynamo is not imported, an import hook sets the stance as soon as it is.

_DYNAMO = "torch._dynamo"

_INSIDE_COMPILED = (
    "a capture cannot be opened inside a function that is being compiled: its hooks would be traced, not run. Open the "
    "capture around the compiled call, or compile convtap.tapped(model), which returns "
    "(output, {name: tensor}) and traces with fullgraph=True."
)

_lock = Lock()
_blocks: set[object] = set()
_stance: Any = None


def refuse_inside_compiled() -> None:
    """Refuses to work inside a function that is being compiled, or that Dynamo runs piece by piece.

    Raises:
        Unsupported: that is so here.
    """
    if torch.compiler.is_compiling():
        raise Unsupported(_INSIDE_COMPILED)
    if _DYNAMO in sys.modules:
        callback = _frame_callback()
        if callback is not None and callback is not False:
            raise Unsupported(_INSIDE_COMPILED)


@cache
def _lends(function: Callable[[], Any]) -> bool:
    """Whether a function gives no reference away with what it returns. See Note: [References lent by torch]."""
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
    """Returns what Dynamo runs this thread's functions with now, or None or False if it lets them be.

    Args:
        asked: how often torch itself asked just before; what that took is given back as well.
    """
    from torch._C._dynamo import eval_frame

    function = getattr(eval_frame, "get_eval_frame_callback", _no_callback)
    callback = function()
    for _ in range(asked + 1 if _lends(function) else 0):
        give_reference(callback)
    return callback


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled: by ``torch.compile``, by ``compile()``, or because its ``forward`` is."""
    if "torch._dynamo" not in sys.modules:
        return False
    if type(module).__name__ == "OptimizedModule" and type(module).__module__ == "torch._dynamo.eval_frame":
        return type(module.dynamo_ctx).__name__ != "DisableContext"
    if call_shim.compiled_call(module) is not None:
        return True
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def current() -> str:
    """Returns Dynamo's stance, without ours: ``"default"`` unless the user set another one."""
    if "torch._dynamo" not in sys.modules:
        return "default"
    from torch._dynamo import eval_frame

    with _lock:
        stance = eval_frame._stance if _stance is None else _stance.prev
    return str(getattr(stance, "stance", "default"))


def uses_cuda_graphs(wrapper: nn.Module) -> bool:
    """Whether a compiled model is replayed as a CUDA graph, in which no kernel of convtap runs."""
    if not any(parameter.is_cuda for parameter in wrapper.parameters()):
        return False
    settings = getattr(getattr(wrapper, "dynamo_ctx", None), "compiler_config", None) or {}
    return bool(settings.get("triton.cudagraphs") or torch._inductor.config.triton.cudagraphs)


def enter(block: object) -> None:
    """Counts a block in."""
    with _lock:
        _blocks.add(block)
        if len(_blocks) == 1:
            _force()


def leave(block: object) -> None:
    """Counts a block out; again does nothing. See Note: [Interrupts]"""
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

        if getattr(eval_frame, "_stance", _stance.stance) is _stance.stance:  # else somebody set another one since
            _stance.__exit__(None, None, None)
            _frame_callback(asked=1)
        _stance = None
