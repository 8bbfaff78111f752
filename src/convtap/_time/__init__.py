"""The time axis: which input samples each frame of a layer's output sees."""
