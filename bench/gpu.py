"""hatrack's training step on a GPU against peft's, and the matmuls alone. One table and JSON.

    .venv/bin/python bench/gpu.py [--rounds 5] [--only "7B"] [--output DIR]

Models have their published shapes and random bfloat16 weights. peft runs as its Trainer does with `bf16=True`: the base
in bfloat16, the adapter in float32 under autocast, stock attention, loss and fused AdamW. One side after the other in
one process, three steps before those that count; figures are medians.
"""

import argparse
import gc
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import hatrack
from hatrack.evaluate.loss import losses
from hatrack.layers.fast_base import speed_up
from sides import ALL_LINEAR, matmuls_of, multiply, update

SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}
WORKS: dict[str, tuple[str, list[str], int, int, float]] = {
    "SmolLM2-135M, all-linear, 4 x 256, dropout 0.05": ("SmolLM2-135M", ALL_LINEAR, 4, 256, 0.05),
    "SmolLM2-135M, all-linear, 32 x 256, dropout 0.05": ("SmolLM2-135M", ALL_LINEAR, 32, 256, 0.05),
    "1.1B, all-linear, 8 x 512, dropout 0.05": ("1.1B", ALL_LINEAR, 8, 512, 0.05),
    "7B, all-linear, 4 x 512, dropout 0.05": ("7B", ALL_LINEAR, 4, 512, 0.05),
    "7B, q,v, 4 x 512": ("7B", ["q_proj", "v_proj"], 4, 512, 0.0),
}
SIDES = ("hatrack", "peft", "floor")


class Side:
    """One side of one piece of work on the GPU, ready to take steps on a fixed batch."""

    def __init__(self, work: str, side: str, base: Any, device: torch.device) -> None:
        _, targets, rows, tokens, dropout = WORKS[work]
        self.side, self.device = side, device
        ids = torch.randint(1000, 20000, (rows, tokens), device=device)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        self.matmuls = matmuls_of(base, rows * tokens)
        self.trained: list[torch.Tensor] = []
        if side != "floor":
            config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
            if side == "hatrack":
                speed_up(base)
            self.model = (hatrack.get_peft_model if side == "hatrack" else get_peft_model)(base, config).train()
            self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def step(self) -> float:
        """Seconds of one training step."""
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        if self.side == "floor":
            multiply(self.matmuls)
        else:
            self._loss().backward()
            update(self.trained, self.optimizer)
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def _loss(self) -> Any:
        if self.side == "hatrack":
            return losses(self.model, self.batch, "chat")[0].mean()
        with torch.autocast("cuda", torch.bfloat16):
            return self.model(**self.batch).loss


def measure(work: str, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step and the peak bytes beside the base's weights, for each side."""
    config = LlamaConfig(**SHAPES[WORKS[work][0]], max_position_embeddings=4096)  # type: ignore[arg-type]
    found: dict[str, dict[str, float]] = {}
    with torch.device(device):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    held = torch.cuda.memory_allocated(device)
    for side in SIDES:
        made = Side(work, side, base, device)
        for _ in range(3):
            made.step()
        torch.cuda.reset_peak_memory_stats(device)
        times = [made.step() for _ in range(rounds)]
        peak = torch.cuda.max_memory_allocated(device) - held
        found[side] = {"ms": 1000 * statistics.median(times), "peak_bytes": peak}
        if side != "floor":
            base = made.model.unload()
        del made
        gc.collect()
        torch.cuda.empty_cache()
    return found


def main() -> None:
    """Prints the table and writes gpu.json."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py needs a CUDA device; bench/speed.py measures the CPU")
    device = torch.device("cuda")
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "works": {}}
    print(f"{results['device']}, torch {torch.__version__}")
    for work in WORKS:
        if given.only not in work:
            continue
        found = results["works"][work] = measure(work, given.rounds, device)
        own, floor = found["hatrack"], found["floor"]["ms"]
        print(
            f"{work}: hatrack {own['ms']:.1f} ms, peft {found['peft']['ms']:.1f} ms "
            f"({found['peft']['ms'] / own['ms']:.2f}x), matmuls {floor:.1f} ms ({own['ms'] / floor:.2f}x); "
            f"beside the base {own['peak_bytes'] / 2**30:.2f} against {found['peft']['peak_bytes'] / 2**30:.2f} GiB",
            flush=True,
        )
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "gpu.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
