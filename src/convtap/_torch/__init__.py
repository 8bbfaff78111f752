"""The parts of torch that torch does not document: one mechanism per module."""
