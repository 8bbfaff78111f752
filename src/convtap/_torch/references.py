"""Repays the references that torch 2.6 takes without owning them."""

from __future__ import annotations

import ctypes

# Note: [References lent by torch]
# Assumption: a function that returns an object gives a reference to it away.
# Failure: ``get_eval_frame_callback`` of torch 2.6 gives none, so whoever calls it, as each change of the stance does,
#   takes one from None. Until Python 3.12, which never frees it, that ends the process after some thousand blocks.
# Choice: seen once by counting; where it is so, what is taken by a call is given back after it.
#   ``_stash_obj_in_tls`` of torch 2.6 keeps an object without a reference of its own: it is given one.

give_reference = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))
