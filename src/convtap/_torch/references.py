"""Adds the references that torch 2.6 forgets to take."""

from __future__ import annotations

import ctypes

# Note: [References lent by torch]
# Assumption: a function that returns an object also returns a new reference to it.
# Failure: ``get_eval_frame_callback`` of torch 2.6 returns None without a new reference, so each call, as in each change of
#   the stance, takes a reference away from None. Before Python 3.12, in which None is immortal, that ends the process after
#   some thousand captures.
# Choice: convtap counts references once. If a call takes a reference, convtap adds one after the call.
#   ``_stash_obj_in_tls`` of torch 2.6 keeps an object without a reference to it, so convtap adds that one as well.

give_reference = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))
