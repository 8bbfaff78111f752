"""Captures the output of every Conv1d layer of any PyTorch model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from convtap._capture.capture import Capture, capture
from convtap._capture.list_layers import LayerRow, list_layers
from convtap._errors import (
    AmbiguousCall,
    ConvtapError,
    CoverageWarning,
    InvalidType,
    InvalidValue,
    LayerNotFound,
    MemoryLimitExceeded,
    MissingExtra,
    ModifiedInPlace,
    NonFiniteOutput,
    NotCaptured,
    OffloadWarning,
    OutOfRange,
    StoreError,
    Unsupported,
)
from convtap._result.activations import Activations
from convtap._result.call import Call
from convtap._result.coverage import Coverage, LayerCoverage
from convtap._result.load import load
from convtap._table import Table
from convtap._torch.gil import refuse_free_threading as _refuse_free_threading

if TYPE_CHECKING:
    from convtap._capture.statistics import StatisticsCapture, statistics
    from convtap._capture.tapped import Tapped, tapped
    from convtap._dataset.extract import extract
    from convtap._dataset.store import Store
    from convtap._dataset.store_dataset import StoreDataset
    from convtap._dataset.views import LayerView
    from convtap._debug.compare import compare
    from convtap._debug.comparison import Comparison
    from convtap._debug.drift import Drift, LayerDrift
    from convtap._debug.finding import Finding
    from convtap._debug.finite import Finite, finite
    from convtap._debug.metrics import Difference
    from convtap._debug.probe import Range
    from convtap._result.layer_statistics import LayerStatistics
    from convtap._result.statistics import Statistics
    from convtap._time.hit import Hit, Window, windows
    from convtap._time.layer_time import LayerTime
    from convtap._time.timeline import Timeline, timeline
    from convtap._time.top import top

_refuse_free_threading()

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "AmbiguousCall",
    "Call",
    "Capture",
    "Comparison",
    "ConvtapError",
    "Coverage",
    "CoverageWarning",
    "Difference",
    "Drift",
    "Finding",
    "Finite",
    "Hit",
    "InvalidType",
    "InvalidValue",
    "LayerCoverage",
    "LayerDrift",
    "LayerNotFound",
    "LayerRow",
    "LayerStatistics",
    "LayerTime",
    "LayerView",
    "MemoryLimitExceeded",
    "MissingExtra",
    "ModifiedInPlace",
    "NonFiniteOutput",
    "NotCaptured",
    "OffloadWarning",
    "OutOfRange",
    "Range",
    "Statistics",
    "StatisticsCapture",
    "Store",
    "StoreDataset",
    "StoreError",
    "Table",
    "Tapped",
    "Timeline",
    "Unsupported",
    "Window",
    "capture",
    "compare",
    "extract",
    "finite",
    "list_layers",
    "load",
    "statistics",
    "tapped",
    "timeline",
    "top",
    "windows",
]

# Imported on first use. A capture needs none of them, and together they take as long to import as all the rest.
_WHEN_ASKED = {
    "Comparison": "_debug.comparison",
    "Difference": "_debug.metrics",
    "Drift": "_debug.drift",
    "Finding": "_debug.finding",
    "Finite": "_debug.finite",
    "Hit": "_time.hit",
    "LayerDrift": "_debug.drift",
    "LayerStatistics": "_result.layer_statistics",
    "LayerTime": "_time.layer_time",
    "LayerView": "_dataset.views",
    "Range": "_debug.probe",
    "Statistics": "_result.statistics",
    "StatisticsCapture": "_capture.statistics",
    "Store": "_dataset.store",
    "StoreDataset": "_dataset.store_dataset",
    "Tapped": "_capture.tapped",
    "Timeline": "_time.timeline",
    "Window": "_time.hit",
    "compare": "_debug.compare",
    "extract": "_dataset.extract",
    "finite": "_debug.finite",
    "statistics": "_capture.statistics",
    "tapped": "_capture.tapped",
    "timeline": "_time.timeline",
    "top": "_time.top",
    "windows": "_time.hit",
}


# Pickles of version 0.1.0 name modules that have moved.
__path__.append(f"{__path__[0]}/_old_paths")

_MODULES = ("plot", "ray", "report")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"convtap.{name}")
    if name in _WHEN_ASKED:
        found = getattr(importlib.import_module(f"convtap.{_WHEN_ASKED[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'convtap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
