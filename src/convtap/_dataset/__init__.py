"""A data set's outputs on disk: the run that writes shards, and the store that reads them."""
