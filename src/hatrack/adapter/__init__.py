"""Adapters: placed on a base, counted, saved, read, proven, registered."""
