"""Old paths of the store, for pickles of version 0.1.0."""
