"""Checks captures of published models with trained weights (``make gallery``)."""
