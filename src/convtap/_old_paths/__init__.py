"""Module names of version 0.1.0, so its pickles still load.

Each module imports its classes from their new place. ``convtap/__init__.py`` adds this folder to the package's search path,
so ``import convtap._call`` finds it.
"""
