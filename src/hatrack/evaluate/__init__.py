"""How well a model does, and whether an adapter made it better."""
