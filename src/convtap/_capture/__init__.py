"""Opens and closes captures: the session that wires taps, recorder and log, and the functions built on it."""
