"""Tests once per process whether torch's private parts behave as expected."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convtap._errors import warn_user
from convtap._torch import call_shim, convolution_key, modes
from convtap._torch.call_stack import Calls
from convtap._torch.cleanup import undone
from convtap._torch.weight_reads import WeightReads

# Note: [Private parts of torch]
# Assumption: the private parts of torch that this package uses behave as in the versions that it was tested with.
# Failure: another version of torch, or a library that replaces parts of it, changes one of them. Values are then silently
#   missing or wrong.
# Choice: the first capture tries each part on a small model: a call of a module, a convolution called as a function, a call
#   within a call, a fetch of a weight. (``storage`` tries an in-place write at import.) convtap warns once, names the parts
#   that fail, and uses a substitute: hooks instead of shims, the function mode instead of the convolution key. Without the
#   call stack, functions are not watched.

SHIM = "the call of a module does not reach its shim"
KEY = "a convolution called as a function does not reach the convolution key"
STACK = "convtap does not find module calls on the call stack"
FETCH = "convtap does not notice when code fetches a weight"

_INSTEAD = {
    SHIM: "convtap uses hooks on layers instead",
    KEY: "convtap uses a mode that sees every torch call instead, which is slower",
    STACK: "convolutions that are called as functions are not captured",
    FETCH: "layers that a fused kernel computes are reported as idle, not as bypassed",
}


class _Probe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 1, device="cpu", dtype=torch.float32)
        self.around: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(self.conv(x), self.conv.weight)


class _Tap:
    """Stands for a capture, and notes the events of the key, the shim and the weight."""

    compiled_code_ran = False

    def __init__(self, model: _Probe) -> None:
        self.model = model
        self.seen: list[str] = []

    def before(self, transposed: int | None, args: Any, kwargs: Any) -> None:
        if len(args) > 1 and args[1] is self.model.conv.weight:
            self.seen.append("key")

    def after(self, plan: Any, output: Any, args: Any, kwargs: Any) -> None:
        """Is never called, since ``before`` returns None."""

    def pause(self) -> None:
        """Is never called, since no compiled code runs."""

    def resume(self) -> None:
        """Is never called, since no compiled code runs."""

    def may_read(self, name: str) -> bool:
        self.seen.append("fetch")
        return False

    def weight_used(self, name: str, by: object) -> None:
        """Is never called, since ``may_read`` returns False."""

    def called(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.seen.append("shim")
        calls = Calls(self.model)
        self.model.around = list(calls.modules())
        calls.forget()
        return call(*args, **kwargs)


def run() -> frozenset[str]:
    """Returns the parts that do not work in this process, and warns the first time."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return frozenset()  # a probe inside vmap, grad or jvp proves nothing
    found = _failures()
    _warn(found)
    return found


@functools.cache
def _failures() -> frozenset[str]:
    with modes.outside_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model = _Probe()
        tap = _Tap(model)
        contextvars.copy_context().run(_try, model, tap)
    expected = {"shim": SHIM, "fetch": FETCH} | ({"key": KEY} if convolution_key.is_available() else {})
    failed = {text for what, text in expected.items() if what not in tap.seen}
    if not convolution_key.is_available():
        failed.add(KEY)
    if SHIM not in failed and model.around != [model.conv, model]:
        failed.add(STACK)
    return frozenset(failed)


def _try(model: _Probe, tap: _Tap) -> None:
    token, reads, here = modes.Token(), WeightReads(), convolution_key.here()
    steps: list[Callable[[], object]] = [
        lambda: modes.leave(token),
        lambda: call_shim.leave([model.conv], tap.called),
        reads.close,
        lambda: convolution_key.end(token, here),
    ]
    with undone(steps):
        modes.enter(token)
        token.tap = tap
        call_shim.listen(model.conv, tap.called)
        reads.open(tap, [("conv", model.conv)])
        if convolution_key.is_available():
            convolution_key.begin(token, here)
        model(torch.zeros(1, 1, 1, device="cpu", dtype=torch.float32))


@functools.cache
def _warn(failed: frozenset[str]) -> None:
    if failed:
        what = "; ".join(f"{text} ({_INSTEAD[text]})" for text in sorted(failed))
        warn_user(
            f"torch {torch.__version__} differs from the versions that convtap was tested with: {what}. "
            "Check the captured layers in acts.coverage, or use a version that docs/limits.md names.",
        )
