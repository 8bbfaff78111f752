"""Capture sessions, and the public functions that open them."""
