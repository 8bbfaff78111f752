"""Taps the 1-D convolutions of any PyTorch model during a normal forward pass."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from convtap._call import Call
from convtap._capture import Capture, capture
from convtap._errors import (
    AmbiguousCall,
    ConvtapError,
    CoverageWarning,
    LayerNotFound,
    MemoryLimitExceeded,
    MissingExtra,
    ModifiedInPlace,
    NonFiniteOutput,
    NotCaptured,
    OffloadWarning,
    StoreError,
    Unsupported,
)
from convtap._layers import list_layers
from convtap._result import Activations
from convtap._save import load

if TYPE_CHECKING:
    from convtap._debug.compare import compare
    from convtap._debug.finite import finite
    from convtap._disk.extract import extract
    from convtap._disk.store import Store
    from convtap._tapped import Tapped, tapped
    from convtap._time.timeline import timeline
    from convtap._time.top import top

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "AmbiguousCall",
    "Call",
    "Capture",
    "ConvtapError",
    "CoverageWarning",
    "LayerNotFound",
    "MemoryLimitExceeded",
    "MissingExtra",
    "ModifiedInPlace",
    "NonFiniteOutput",
    "NotCaptured",
    "OffloadWarning",
    "Store",
    "StoreError",
    "Tapped",
    "Unsupported",
    "capture",
    "compare",
    "extract",
    "finite",
    "list_layers",
    "load",
    "tapped",
    "timeline",
    "top",
]

# Imported when they are first asked for: a block needs none of them, and together they take as long as all the rest.
_WHEN_ASKED = {
    "Store": "_disk.store",
    "Tapped": "_tapped",
    "compare": "_debug.compare",
    "extract": "_disk.extract",
    "finite": "_debug.finite",
    "tapped": "_tapped",
    "timeline": "_time.timeline",
    "top": "_time.top",
}


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
