"""Runs the tests on several versions of Python and torch: ``python -m matrix``."""
