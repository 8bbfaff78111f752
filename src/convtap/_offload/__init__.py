"""Moves kept tensors to another device: transfers on streams of their own, from a pool of pinned memory."""
