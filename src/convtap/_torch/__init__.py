"""The only folder that touches private parts of torch."""
