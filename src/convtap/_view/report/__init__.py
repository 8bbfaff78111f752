"""Writes the HTML report of a capture, without matplotlib."""
