"""What of a model is captured, and what it is run on: the module tree, the selection, weight owners, examples."""
