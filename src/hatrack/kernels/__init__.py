"""The arithmetic of a step: each function by a kernel of our own or, where it does not fit, by torch."""
