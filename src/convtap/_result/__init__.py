"""What a capture returns: calls, the log they are in, coverage, samples, a file, and the mapping of all of it."""
