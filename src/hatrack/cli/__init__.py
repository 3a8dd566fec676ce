"""One small file per command; the only room that may import inside functions."""
