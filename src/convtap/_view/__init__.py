"""Draws captures: the parts that plot and report share, matplotlib's figures, and the report in a folder of its own."""
