"""Taps, which see outputs: one class for each place where outputs appear."""
