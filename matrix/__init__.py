"""Runs the tests on many Pythons and versions of torch, and writes docs/versions.md: ``python -m matrix``."""
