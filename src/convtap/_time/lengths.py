"""Runs the passes that follow the time axis, over other lengths too if necessary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from convtap._errors import InvalidType, listed
from convtap._select.example import called, looking, own_tensors
from convtap._select.module_tree import ModuleTree
from convtap._tensors.nested import MISSING, walk_tensors, with_part
from convtap._time.axis_count import Guess
from convtap._time.edge import Edges
from convtap._time.follow import Follower
from convtap._time.record import Pass, Record
from convtap._torch import compile_stance
from convtap._torch.cleanup import undone

# Note: [Numbers that the model computes]
# Assumption: a pass shows the numbers that operations receive, and not where the model has them from.
# Failure: ``x[..., :98]`` of 100 frames drops two frames, or keeps 98. The frames of another length depend on which.
# Choice: such a step is a Guess. If there is any, the model also runs on an input that is one sample longer and on one that
#   is a third longer (on others, if it does not accept these). The step that explains every pass is chosen. If none does,
#   asking for the frames of another length is an error.

#: The maximum number of further passes.
_ENOUGH = 8


def follow(how: Pass, example: Any) -> tuple[list[Record], ModuleTree]:
    """Follows the time axis of an example through a model, in one or more passes.

    The model is unchanged afterwards.
    """
    records, tree = _run(how, example)
    guesses = _guesses(records)
    # after all frames were mixed, an axis may be time again, unknown to the marks; another length shows that
    mixed = any(record.mark.whole or not (record.mark.digits or record.mark.unknown) for record in records)
    if not mixed and not guesses:
        return records, tree
    length = int(dict(walk_tensors(example))[how.path].shape[how.axis])
    passes: list[tuple[int, list[Record]]] = []
    for change in _changes(records, length) if guesses else (length // 3 | 1, 1):
        settled = len(passes) > bool(guesses) and not any(guess.is_open for guess in guesses)
        if settled or len(passes) == _ENOUGH or length + change < 1:
            break
        try:
            others, _ = _run(how, _resized(example, how.path, how.axis, change))
        except Exception:  # the model does not accept this length, so open guesses stay open
            continue
        passes.append((length + change, others))
        _compare(records, others, length, length + change)
    for guess in guesses:
        guess.conclude()
    same = [(samples, others) for samples, others in passes if _names(others) == _names(records)]
    found = [_doubted(one, [(samples, others[i]) for samples, others in same]) for i, one in enumerate(records)]
    return found, tree


def _run(how: Pass, example: Any) -> tuple[list[Record], ModuleTree]:
    """Runs a model once on a copy of an example."""
    with _outside_inference():
        example = own_tensors(example)  # the model may write into them
        inputs = dict(walk_tensors(example))
    tree = ModuleTree(how.model)
    trains = {module for module in tree.names.values() if getattr(module, "training", False)}
    opened = object()
    with undone([partial(compile_stance.leave, opened)]):
        compile_stance.enter(opened)
        # In inference mode, operations are not decomposed into those that have rules.
        with _outside_inference(), looking(how.model):
            if any(isinstance(parameter, UninitializedParameter) for parameter in how.model.parameters()):
                called(how.model, own_tensors(example), how.method)
            inputs[how.path] = inputs[how.path].clone()  # it may be in the example twice
            follower = Follower(tree, how, inputs, trains)
            with follower.watching():
                called(how.model, _with(example, how.path, inputs[how.path]), how.method)
    return follower.records, tree


def _outside_inference() -> AbstractContextManager[Any]:
    """A context outside of inference mode.

    It has no guard of torch without need: one that an interrupt strikes is freed later, and restores then what it found.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


# -- other lengths


def _changes(records: Sequence[Record], length: int) -> list[int]:
    """Returns by how many samples to change the input, in the order to try.

    The first are one sample, a third of the length, and one frame of each stride.
    """
    strides = {math.ceil(one.mark.first.slope) for one in records if one.mark.digits}
    hops = sorted(strides, reverse=True)[:4]
    return list(dict.fromkeys((1, length // 3 | 1, *hops, 2, 3, 5, 7, *(3 * hop for hop in hops[:1]), -1)))


def _resized(example: Any, path: str, axis: int, change: int) -> Any:
    """Returns an example with more or fewer samples.

    Other tensors with an axis of the same length are changed too.
    """
    tensors = dict(walk_tensors(example))
    length = tensors[path].shape[axis]
    for other, tensor in tensors.items():
        same = [axis] if other == path else [dim for dim in range(tensor.dim()) if tensor.shape[dim] == length]
        if same:
            example = _with(example, other, _stretched(tensor, same[-1], change))
    return example


def _stretched(tensor: Tensor, axis: int, change: int) -> Tensor:
    """Repeats the last sample, or removes samples."""
    size = tensor.shape[axis]
    index = torch.arange(size + change, device=tensor.device).clamp(max=size - 1)
    return tensor.index_select(axis, index)


def _with(value: Any, path: str, tensor: Tensor) -> Any:
    """Returns an example with the tensor at a path replaced."""
    found = with_part(value, path, tensor)
    if found is MISSING:
        raise InvalidType(f"the example's signal is in a {type(value).__name__}. Pass it in a tuple or a dict.")
    return found


# -- what several passes show


def _counted(records: Sequence[Record]) -> list[Guess]:
    return [guess for record in records for digit in record.mark.digits for guess in digit.count.guesses()]


def _edge_guesses(records: Sequence[Record]) -> list[Guess]:
    """Returns the guesses that edges rest on. See Note: [Padded inputs]."""
    return Edges([record.mark.edge for record in records]).guesses()


def _guesses(records: Sequence[Record]) -> list[Guess]:
    return list({id(guess): guess for guess in (*_counted(records), *_edge_guesses(records))}.values())


def _names(records: Sequence[Record]) -> list[str]:
    return [record.name for record in records]


def _compare(records: Sequence[Record], others: Sequence[Record], samples: int, length: int) -> None:
    """Settles each guess once, with the same operation in another pass."""
    pairs: list[tuple[list[Guess], list[Guess]]] = []
    if _names(records) == _names(others):
        pairs = [(_counted([one]), _counted([other])) for one, other in zip(records, others, strict=True)]
    edges = (_edge_guesses(records), _edge_guesses(others))
    if len(edges[0]) == len(edges[1]):
        pairs.append(edges)
    done: set[int] = set()
    for mine, theirs in pairs:
        for guess, same in zip(mine, theirs, strict=False):
            if id(guess) not in done and guess.what == same.what:
                done.add(id(guess))
                guess.settle(same, samples, length)


def _doubted(one: Record, others: Sequence[tuple[int, Record]]) -> Record:
    """Returns a run's record with the doubts that runs over other lengths raise."""
    mark, axis, place, doubt = one.mark, one.mark.unknown, None, None
    for samples, other in others:
        if not mark.unknown and not other.mark.unknown and _other_axes(one) != _other_axes(other):
            by = f" after {listed([*mark.whole, *mark.statistics], 2)}" if mark.whole else ""
            shapes = f"{one.shape} and {other.shape}"
            axis = axis or f"its output has shape {shapes} for two lengths{by}, and its frames were not followed"
        if not mark.digits or not other.mark.digits:
            continue
        seen = other.mark.digits[-1].size
        if mark.digits[-1].count(samples) != seen:
            doubt = doubt or f"the operations before {one.name!r} ({samples} samples made {seen} frames)"
        if (mark.first, mark.last) != (other.mark.first, other.mark.last):
            place = place or f"the frames of {one.name!r} lie elsewhere for {samples} samples"
    fixed = mark.fixed if place is None else (*mark.fixed, place)
    return replace(one, mark=replace(mark, unknown=axis, fixed=fixed), doubt=doubt)


def _other_axes(record: Record) -> list[int]:
    """Returns the sizes of an output's axes that are neither the batch nor time."""
    return [size for dim, size in enumerate(record.shape) if dim and dim not in record.mark.dims]
