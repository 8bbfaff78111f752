"""What time is to a layer: which input samples a frame sees, which frames are real, which windows drive a channel."""
