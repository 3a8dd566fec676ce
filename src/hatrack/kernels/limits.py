"""Block sizes of the kernels, which memory plans use too. Imports no torch."""

ATTENTION_BLOCK = 2**22
"""Attention probabilities held at a time: small enough for the CPU's cache."""
LOGITS_BLOCK, LOGITS_BLOCK_ON_ACCELERATOR = 2**23, 2**26
"""Logits held at a time: 16 and 128 MiB of them in bfloat16."""
WEIGHT_CHUNK = 2**21
"""Elements of a weight that are converted to the matmul's dtype at a time: 8 MiB of float32."""
CACHED_MATMULS = 64
"""The most compiled bfloat16 matmuls that oneDNN caches, one per shape of the inputs. Its own default is 1,024."""
