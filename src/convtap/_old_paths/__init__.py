"""The module names that pickles of version 0.1.0 hold: each leads to where its classes are now.

This folder is part of the package's own search path (see ``convtap/__init__.py``), so ``convtap._call`` is found here.
"""
