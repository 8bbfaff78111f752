"""Pure functions of tensors and of the structures that hold them: nesting, memory, snapshots, statistics."""
