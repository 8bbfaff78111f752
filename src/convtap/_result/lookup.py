"""Finds a call by its key, and describes why there is none."""

from __future__ import annotations

from functools import partial
from typing import Any

from convtap._errors import AmbiguousCall, LayerNotFound, brief, did_you_mean, listed
from convtap._result.call import Call
from convtap._result.log import Log
from convtap._select.parts import find


def find_output(log: Log, key: str) -> Any:
    """Returns the output, or the part of an output, that a key names; ``MISSING`` if there is no such call.

    Raises:
        AmbiguousCall: the layer ran several times.
        LayerNotFound: the call is here and has no such part.
    """
    return find(key, partial(find_call, log))


def find_call(log: Log, key: str) -> Call | None:
    """Returns the call that a key names, or None.

    Raises:
        AmbiguousCall: the layer ran several times.
    """
    index = log.index()
    call = index.get(key)
    if call is not None:
        return call
    name = log.resolve(key)
    if name is None:
        stem, mark, number = key.rpartition("#")
        name = log.resolve(stem) if mark else None
        return None if name is None else index.get(f"{name}#{number}")
    record = log.records.get(name)
    if record is not None and record.held > 1:
        raise _ambiguous(log, name)
    return index.get(name)


def _ambiguous(log: Log, name: str) -> AmbiguousCall:
    record = log.records[name]
    held = record.held
    return AmbiguousCall(
        f"{name!r} ran {held} times, so its plain name does not say which output is meant. Take all of them with "
        f"acts.calls({name!r}), one with acts[{record.key(1, held)!r}], or join them with acts.cat({name!r})."
    )


def not_a_name(log: Log, key: Any) -> LayerNotFound:
    """Returns the error for a key that is not a name, such as a position."""
    calls = list(log.calls.values())
    if isinstance(key, int) and not isinstance(key, bool) and -len(calls) <= key < len(calls):
        position = key % len(calls)
        return LayerNotFound(
            f"acts[{key}]: keys are names; {_ordinal(position + 1)} call is acts.calls()[{position}], "
            f"layer {calls[position].name!r}."
        )
    return LayerNotFound(f"acts[{brief(key)}]: keys are names, and these are here: {listed(log.index())}.")


def missing(log: Log, key: str) -> LayerNotFound:
    """Returns the error for a name without an output."""
    name = log.resolve(key)
    if name is not None:
        state = {state.name: state for state in log.states()}[name]
        if state.captured:
            why = "its outputs were cleared"
        elif state.unactivated:
            why = (
                f"it {state}. Capture it with at='output', the activations themselves with types=nn.ReLU, or name its "
                "activation's type with activations=(...)"
            )
        else:
            why = f"it is {state}: no output of it was seen"
        return LayerNotFound(f"{key!r} was selected, but {why}. Captured here: {listed(log.index())}.")
    known = list(dict.fromkeys([*log.index(), *log.names()]))
    return LayerNotFound(f"no output is named {key!r}. Captured here: {listed(log.index())}.{did_you_mean(key, known)}")


def _ordinal(number: int) -> str:
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    return f"the {words[number - 1]}" if number <= len(words) else f"call number {number}"
