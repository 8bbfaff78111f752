"""Draws captures as matplotlib figures and as an HTML report."""
