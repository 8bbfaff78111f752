"""Extracts a data set's outputs into shards on disk, which a store reads."""
