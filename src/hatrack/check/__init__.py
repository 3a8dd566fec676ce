"""Finds mistakes that raise no error: one function per gotcha."""
