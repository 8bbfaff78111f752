"""Merges the statistics of all ranks of a distributed run, so that each has the whole."""

from __future__ import annotations

from typing import Any

import torch.distributed

from convtap._errors import ConvtapError
from convtap._result.layer_statistics import LayerStatistics
from convtap._result.statistics import merged_layer

# Note: [Ranks]
# Assumption: all ranks collect statistics of one model, and reach the end.
# Failure: a rank that has no data, or that failed, has other layers than the others, or none; collectives that do not
#   match wait for ever. All states at once may be too much for the memory of one rank.
# Choice: the ranks first agree on the layers, in the order of the ranks, and on whether one of them failed; then each layer
#   is gathered and merged by itself. A rank whose model raised takes no part: torch ends the others' wait as it would end
#   that of any collective.


def rank_count() -> int:
    """Returns how many processes work together; 1 without ``torch.distributed``."""
    found = torch.distributed
    return found.get_world_size() if found.is_available() and found.is_initialized() else 1


def merge_ranks(layers: dict[str, LayerStatistics], failure: str | None) -> dict[str, LayerStatistics]:
    """Returns the statistics of all ranks together, the same on each. See Note: [Ranks].

    Raises:
        ConvtapError: a rank failed.
        InvalidValue: two ranks have other channels of one layer.
    """
    names = _gathered((list(layers), failure))
    failed = {rank: text for rank, (_, text) in enumerate(names) if text is not None}
    if failed:
        rank, text = next(iter(failed.items()))
        raise ConvtapError(f"the statistics of rank {rank} are not complete: {text}")
    found: dict[str, LayerStatistics] = {}
    for name in dict.fromkeys(name for own, _ in names for name in own):
        mine = layers.get(name)
        parts = _gathered(None if mine is None else merged_layer([mine]))  # on the CPU
        found[name] = merged_layer([part for part in parts if part is not None])
    return found


def _gathered(own: Any) -> list[Any]:
    found: list[Any] = [None] * rank_count()
    torch.distributed.all_gather_object(found, own)
    return found
