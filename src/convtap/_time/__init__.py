"""What time is to a layer: which input samples a frame sees, which frames are real, which windows drive a channel."""

# Pickles of version 0.1.0 name a module that has moved.
__path__.append(f"{__path__[0]}/../_old_paths/_time")
