"""The other trainers that `bench/peers.py` compares: one in a process of its own, with the Python it is installed in.

    PYTHON bench/peer_sides.py '{"side": "litgpt", "rows": 4, "tokens": 256, "targets": "all-linear", ...}'

Speaks as `bench/sides.py` does: `steps` and `peak` from standard input, a line of JSON for each. The model has the
shape of SmolLM2-135M and random weights, since time does not depend on them; loss, layers and compiled steps are those
of the trainer's own fine-tuning. Knows nothing of hatrack.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

R, ALPHA, DROPOUT, LR = 8, 16, 0.05, 1e-4


def litgpt(asked: dict[str, Any]) -> Callable[[], None]:
    """A step as `litgpt finetune_lora` takes it, in one dtype (`--precision bf16-true` or `32-true`)."""
    import torch
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    all_linear = asked["targets"] == "all-linear"
    where = {f"lora_{name}": all_linear for name in ("key", "projection", "mlp")}
    where |= {"lora_query": True, "lora_value": True}
    config = Config.from_name("SmolLM2-135M", lora_r=R, lora_alpha=ALPHA, lora_dropout=DROPOUT, **where)
    model = GPT(config)
    model.apply(model._init_weights)
    model.to(getattr(torch, asked["dtype"])).train()
    mark_only_lora_as_trainable(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    ids = torch.randint(1000, 20000, (asked["rows"], asked["tokens"]))

    def step() -> None:
        logits = model(ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        chunked_cross_entropy(logits, ids[..., 1:]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def mlx_lm(asked: dict[str, Any]) -> Callable[[], None]:
    """A step as `mlx_lm.lora` takes it, compiled."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(0)
    shape = {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9}
    shape |= {"num_key_value_heads": 3, "vocab_size": 49152}
    model = Model(ModelArgs(model_type="llama", rms_norm_eps=1e-5, **shape))
    model.set_dtype(getattr(mx, asked["dtype"]))
    model.freeze()
    lora = {"rank": R, "scale": ALPHA / R, "dropout": DROPOUT}
    if asked["targets"] != "all-linear":
        lora["keys"] = ["self_attn.q_proj", "self_attn.v_proj"]
    linear_to_lora_layers(model, 30, lora)
    model.train()
    optimizer = optim.AdamW(learning_rate=LR)
    ids = mx.random.randint(1000, 20000, (asked["rows"], asked["tokens"]))
    lengths = mx.array([[0, asked["tokens"]]] * asked["rows"])
    state = [model.state, optimizer.state, mx.random.state]
    gradients = nn.value_and_grad(model, default_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def compiled() -> Any:
        (loss, _), grads = gradients(model, ids, lengths)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        return loss

    def step() -> None:
        mx.eval(compiled(), state)

    return step


def main() -> None:
    """Answers commands until standard input ends."""
    asked = json.loads(sys.argv[1])
    step = {"litgpt": litgpt, "mlx-lm": mlx_lm}[asked["side"]](asked)

    def timed() -> float:
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    answers: dict[str, Callable[[], Any]] = {
        "steps": lambda: [timed() for _ in range(3)][1:],
        "peak": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
