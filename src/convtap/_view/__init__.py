"""What pictures and the report are made of."""
