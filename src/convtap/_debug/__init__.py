"""Debugging: the first NaN or Inf, and the first layer that diverges."""
