"""Turns the values that taps see into entries of the log, and checks them on exit."""
