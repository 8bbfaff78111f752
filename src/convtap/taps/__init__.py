"""The places where a layer's output can be read, one class each, with the same two methods: open and close."""
