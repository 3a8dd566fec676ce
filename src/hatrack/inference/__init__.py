"""One base in memory and the adapters on it: generation and classification."""
