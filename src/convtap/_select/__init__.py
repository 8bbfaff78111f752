"""Selects the layers of a model, and prepares the examples that it runs on."""
