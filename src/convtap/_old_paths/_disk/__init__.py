"""Where the store was in version 0.1.0."""
