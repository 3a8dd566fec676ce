"""Block sizes of the kernels that memory plans count with too. Imports no torch."""

ATTENTION_BLOCK = 2**22
"""Attention probabilities held at a time: small enough for the CPU's cache."""
LOGITS_BLOCK, LOGITS_BLOCK_ON_ACCELERATOR = 2**23, 2**26
"""Logits held at a time: 16 and 128 MiB of them in bfloat16."""
WEIGHT_CHUNK = 2**21
"""Elements of a weight that are converted to the dtype of a matmul at a time: 8 MiB of float32."""
CACHED_MATMULS = 64
"""Compiled bfloat16 matmuls that oneDNN stores, one for each shape of its inputs. Its own default is 1,024."""
