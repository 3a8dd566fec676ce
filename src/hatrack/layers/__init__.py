"""Modules made of kernels: the fast LoRA layer, the sped-up frozen base, lossless merge; usable in any script."""
