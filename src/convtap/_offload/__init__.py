"""Moves kept tensors to another device, on side streams and into pinned memory."""
