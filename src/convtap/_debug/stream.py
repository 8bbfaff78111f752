"""One model's run, layer by layer: it stops at each captured call until the next one is asked for."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from convtap._capture.options import capture_options
from convtap._capture.session import Session
from convtap._result.call import Call
from convtap._select.example import called, looking, own_tensors

# Note: [Two runs side by side]
# Assumption: a forward pass is one call that cannot be left half way and taken up again.
# Failure: to compare two models layer by layer, one of them would have to run to its end first and all of its outputs be
#   held; or both be run again for each group of layers (measured on 24 layers in groups of 4: six times the time).
# Choice: a run has a thread of its own that waits inside the hook until its caller wants the next call; the outputs held
#   are the two that are compared. Only one thread runs at any time, so nothing is concurrent. What torch keeps per thread
#   (autocast, the CUDA stream) is taken along, and each run has random numbers of its own, as if it ran alone.


class _Abandoned(BaseException):
    """Ends a run whose caller wants no more of it; no Exception, so that the model lets it through."""


class _Handover(dict[Any, Call]):
    """Stands where a block keeps its calls, and hands each on instead of keeping it."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def __setitem__(self, key: Any, call: Call) -> None:
        self._stream._give(call)


class Stream:
    """Iterates over the calls of one forward pass, without keeping them.

    Attributes:
        output: what the model returned, once the calls are through.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Any] | None, types: Any, example: Any, mode: str | None = "eval"
    ) -> None:
        self.output: Any = None
        self._mode = mode
        self._model = model
        self._example = example
        self._capture = capture_options(model, layers, types=types).without_checks()
        self._call: Call | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._abandoned = False
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._random = _random_state()
        self._settings = _thread_settings()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="convtap-compare", daemon=True)

    def __iter__(self) -> Iterator[Call]:
        while True:
            call = self._next()
            if call is None:
                return
            yield call

    def close(self) -> None:
        """Ends the run, wherever it is."""
        self._abandoned = True
        if self._thread.ident is None:
            return  # it never began
        while not self._ended:  # and not while the thread is alive: one that has ended stops nowhere any more
            self._resume()
        self._thread.join()

    def _next(self) -> Call | None:
        if self._ended:
            return None
        self._call = None
        self._resume()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._call

    def _resume(self) -> None:
        if not self._thread.is_alive() and not self._ended:
            self._thread.start()
        mine = _random_state()
        _set_random_state(self._random)
        self._go.release()
        self._stopped.acquire()
        self._random = _random_state()
        _set_random_state(mine)

    def _give(self, call: Call) -> None:
        self._call = call
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with ExitStack() as stack:
                    for setting in self._settings:
                        stack.enter_context(setting)
                    stack.enter_context(looking(self._model, self._mode))
                    session = stack.enter_context(Session(self._capture))
                    session.log.calls = _Handover(self)
                    self.output = called(self._model, own_tensors(self._example))
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._call = None
            self._stopped.release()


def _thread_settings() -> list[Any]:
    """What torch keeps per thread and a model's run depends on, as contexts to enter in another thread."""
    settings: list[Any] = [
        torch.autocast(device, dtype=torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        settings.append(torch.cuda.stream(torch.cuda.current_stream()))
    return settings


def _random_state() -> list[Any]:
    states = [torch.get_rng_state()]
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return states + (torch.cuda.get_rng_state_all() if on_cuda else [])


def _set_random_state(states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
