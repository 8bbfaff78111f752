"""Writes the HTML page of a capture; it needs neither matplotlib nor a network."""
