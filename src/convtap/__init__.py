"""Taps the 1-D convolutions of any PyTorch model during a normal forward pass."""

from convtap._call import Call
from convtap._capture import Capture, capture
from convtap._compare import compare
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
    StoreError,
    Unsupported,
)
from convtap._finite import finite
from convtap._layers import list_layers
from convtap._result import Activations
from convtap._save import load
from convtap._tapped import Tapped, tapped

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
    "StoreError",
    "Tapped",
    "Unsupported",
    "capture",
    "compare",
    "finite",
    "list_layers",
    "load",
    "tapped",
]
