"""Where pickles of version 0.1.0 look for what is now in ``convtap._result.call``."""

from __future__ import annotations

from convtap._result.call import Call, LayerRecord

Tally = LayerRecord

__all__ = ["Call", "Tally"]
