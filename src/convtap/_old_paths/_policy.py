"""Where pickles of version 0.1.0 look for what is now in ``convtap._record.policy``."""

from __future__ import annotations

from convtap._record.policy import Alias, Policy, _copied

__all__ = ["Alias", "Policy", "_copied"]
