"""Pure functions of tensors and of structures of tensors."""
