"""Looks for what goes wrong in silence: one function per gotcha."""
