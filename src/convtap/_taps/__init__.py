"""Where outputs are seen, one class for each place: modules, parts, convolutions, Keras layers, activations."""
