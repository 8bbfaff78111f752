"""Runs a model in a thread that pauses at each captured call."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from convtap._capture.options import capture_options
from convtap._capture.session import Session
from convtap._result.call import Call
from convtap._select.example import called, looking, own_tensors
from convtap._torch.random_state import random_state, set_random_state

# Note: [Two runs side by side]
# Assumption: a forward pass is one call, which cannot be left halfway and resumed.
# Failure: without threads, one model runs first and all of its outputs are held. With 24 layers of 39 MiB that takes
#   1.3 GiB, and more with every layer. Writing each output to a file takes twice the time. Running both models again for
#   each group of 4 layers takes six times the time.
# Choice: each run has a thread that waits in the capture until its caller asks for the next call, so that two outputs are
#   held at any depth (0.5 GiB in this example, most of it to compute the differences in float64). Only one thread runs at
#   any time. The settings that torch keeps per thread (autocast, the CUDA stream) are copied, and each run has its own
#   random numbers.


class _Abandoned(BaseException):
    """Ends a run early. It is not an Exception, so that the model does not catch it."""


class _Handover(dict[Any, Call]):
    """Replaces the calls of a log, and hands each call to the caller."""

    def __init__(self, hand_over: Callable[[Call], None]) -> None:
        super().__init__()
        self._hand_over = hand_over

    def __setitem__(self, key: Any, call: Call) -> None:
        self._hand_over(call)


class Stream:
    """Iterates over the calls of one forward pass, without keeping them.

    Attributes:
        output: the model's output, after the last call.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Any] | None, types: Any, example: Any, mode: str | None = "eval"
    ) -> None:
        self.output: Any = None
        self._mode = mode
        self._model = model
        self._example = example
        self._options = capture_options(model, layers, types=types).without_checks()
        self._call: Call | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._abandoned = False
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._random = random_state()
        self._settings = _thread_settings()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="convtap-compare", daemon=True)

    def __iter__(self) -> Iterator[Call]:
        while not self._ended:
            self._call = None
            self._resume()
            error, self._error = self._error, None
            if error is not None:
                raise error
            if self._call is not None:
                yield self._call

    def close(self) -> None:
        """Ends the run at the call where it waits."""
        self._abandoned = True
        if self._thread.ident is None:
            return  # it never began
        while not self._ended:  # is_alive() would still be true for a moment after the last stop
            self._resume()
        self._thread.join()

    def _resume(self) -> None:
        """Lets the thread run to its next call, with its own random numbers."""
        if self._thread.ident is None:
            self._thread.start()
        mine = random_state()
        set_random_state(self._random)
        self._go.release()
        self._stopped.acquire()
        self._random = random_state()
        set_random_state(mine)

    def _hand_over(self, call: Call) -> None:
        self._call = call
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def _run(self) -> None:
        self._go.acquire()
        try:
            with ExitStack() as stack:
                for setting in self._settings:
                    stack.enter_context(setting)
                stack.enter_context(looking(self._model, self._mode))
                stack.enter_context(Session(self._options)).log.calls = _Handover(self._hand_over)
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
    """Returns this thread's settings of torch, as contexts to enter in another thread."""
    settings: list[Any] = [
        torch.autocast(device, dtype=torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        settings.append(torch.cuda.stream(torch.cuda.current_stream()))
    return settings
