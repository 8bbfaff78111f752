"""Where some modules of ``_time`` were in version 0.1.0."""
