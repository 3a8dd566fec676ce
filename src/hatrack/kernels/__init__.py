"""Arithmetic on tensors: kernels in C++, with torch where they do not apply."""
