"""One module for each model, named for the package that carries its weights.

A module defines ``TITLE`` and ``load()``, which returns the model and a function that runs it on a generated signal. If a
layer returns more than its convolution does, ``captured(model, name, convolution)`` computes the layer's output.
"""
