"""Old path of ``convtap._record.policy``, for pickles of version 0.1.0."""

from __future__ import annotations

from convtap._record.policy import Alias, Policy, _copied

__all__ = ["Alias", "Policy", "_copied"]
