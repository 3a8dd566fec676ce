"""Times a training step with peft's LoRA layers and with hatrack's, in the shape of SmolLM2-135M. In turns, medians.

    .venv/bin/python bench/layer.py [--layers 10] [--rounds 7]

Weights are random, on which the time does not depend. The output head and the loss, the same for both, are left out.
"""

import argparse
import statistics
import time
import warnings

import torch
from peft import LoraConfig
from peft import get_peft_model as peft_get_peft_model
from transformers import LlamaConfig, LlamaModel

import hatrack
from hatrack.base.load import choose_dtype

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = [("q,v", ["q_proj", "v_proj"], 0.0), ("q,v", ["q_proj", "v_proj"], 0.05)]
CASES += [("all-linear", ALL_LINEAR, 0.0), ("all-linear", ALL_LINEAR, 0.05)]


def main() -> None:
    """Prints a table of seconds a step, and how many times as fast hatrack is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=256, help="tokens a row, of 4 rows")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dtype = choose_dtype("auto", torch.device("cpu"))[0]
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{torch.get_num_threads()} threads, {capability}, {options.layers} layers, {dtype}")
    print(f"{'targets':<12}{'dropout':>8}{'peft':>10}{'hatrack':>10}{'ratio':>8}")
    for name, targets, dropout in CASES:
        makers = (peft_get_peft_model, hatrack.get_peft_model)
        wrapped = [_wrapped(make, targets, dropout, options.layers) for make in makers]
        times: list[list[float]] = [[], []]
        for round_number in range(options.rounds + 1):
            for side, model in enumerate(wrapped):
                seconds = _step(model, options.tokens)
                if round_number:  # the first round warms up
                    times[side].append(seconds)
        peft, ours = (statistics.median(side) for side in times)
        print(f"{name:<12}{dropout:>8}{peft:>9.3f}s{ours:>9.3f}s{peft / ours:>7.2f}x", flush=True)


def _wrapped(make: object, targets: list[str], dropout: float, layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    base = LlamaModel(LlamaConfig(vocab_size=49152, num_hidden_layers=layers, **shape)).to(
        choose_dtype("auto", torch.device("cpu"))[0]
    )
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=targets)
    return make(base, config).train()  # type: ignore[operator,no-any-return]


def _step(model: torch.nn.Module, tokens: int) -> float:
    """Seconds of a forward and a backward pass over 4 rows."""
    ids = torch.randint(49152, (4, tokens))
    began = time.perf_counter()
    model(input_ids=ids).last_hidden_state.float().pow(2).mean().backward()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
