"""A data set's outputs on disk: shards, the store that reads them, and the run that writes them."""
