"""One training step over a base larger than its memory, against an ordinary one and against transformers + peft.

    python bench/memory.py                        # a 7B shape: streamed inside 3 and 2 GiB
    python bench/memory.py --layers 12 --stored float32 --sides streamed,ordinary,peft --caps 3GiB
    python bench/memory.py --sides 4bit --batches 1x64  # twice: the first time the base is quantized and cached
    python bench/memory.py --device cuda --sides streamed,ordinary,peft --caps 64GiB  # and what the accelerator held

Writes the base once (Llama's shape, random weights, a file for each layer: 13.5 GB with all 32 layers in bfloat16) to
the cache folder. Each side runs in a process of its own, capped ones in a memory control group (needs root), and has
the base read from the disk again. Prints a table and writes JSON: seconds of a step (forward, backward, clipping,
optimizer), bytes read from disk in it, the most anonymous and the most resident memory in it, and what loading took:
seconds and the most resident memory.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tests.cgroup import forget, group, run_in  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from hatrack.console import format_size  # noqa: E402
from hatrack.recipe import Recipe, parse_size  # noqa: E402
from hatrack.storage import cache_dir  # noqa: E402

SIDES = ("streamed", "ordinary", "4bit", "peft")
"""hatrack over a base on disk; hatrack with the base in memory and checkpointing; the same with the base in 4 bits;
transformers, peft, checkpointing."""
CAPPED = ("streamed", "peft")


def main() -> None:
    """Prints one row for each side and cap."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--stored", default="bfloat16", help="format of the base on disk")
    parser.add_argument("--dtype", default="auto", help="dtype of the matmuls")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", default="4x256", help="micro-batches x tokens of a step; several with commas")
    parser.add_argument("--sides", default="streamed")
    parser.add_argument("--caps", default="3GiB,2GiB", help="of streamed and peft")
    parser.add_argument("--limit", type=int, default=1800, help="seconds after which a side is given up")
    parser.add_argument("--json", type=Path, default=Path("memory.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_one(json.loads(options.one))))
        return
    base = written(options.layers, options.stored)
    there = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(f"base {format_size(there)} in {options.stored}, {torch.get_num_threads()} threads", flush=True)
    header = f"{'side':<10}{'cap':>9}{'batches':>9}{'seconds':>10}{'read':>12}{'of base':>9}{'anonymous':>12}"
    print(f"{header}{'resident':>12}{'loading':>10}{'resident':>12}", flush=True)
    found = []
    for batches in options.batches.split(","):
        for side in options.sides.split(","):
            for cap in options.caps.split(",") if side in CAPPED else [""]:
                asked = {"side": side, "base": str(base), "batches": batches, "dtype": options.dtype}
                asked["device"] = options.device
                result = _run(asked, cap, options.limit)
                found.append(asked | {"cap": cap} | result)
                options.json.write_text(json.dumps({"base_bytes": there, "runs": found}, indent=1))
                numbers = "  " + str(result.get("error"))
                if "seconds" in result:
                    read, loading = result["read"], result["loading"]
                    numbers = f"{result['seconds']:>9.1f}s{format_size(read):>12}{read / there:>8.2f}x"
                    numbers += f"{format_size(result['anonymous']):>12}{format_size(result['resident']):>12}"
                    numbers += f"{loading['seconds']:>9.1f}s{format_size(loading['resident']):>12}"
                    if options.device != "cpu":
                        numbers += f"   {format_size(result['accelerator'])} on {options.device}"
                print(f"{side:<10}{cap or 'none':>9}{batches:>9}{numbers}", flush=True)


def _run(asked: dict[str, Any], cap: str, limit: int) -> dict[str, Any]:
    forget(Path(asked["base"]))
    command = [sys.executable, __file__, "--one", json.dumps(asked)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": limit}
    try:
        if not cap:
            done = subprocess.run(command, **options)
        else:
            with group(parse_size(cap)) as folder:
                if folder is None:
                    return {"error": "no memory control group can be made here"}
                done = run_in(folder, command, **options)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"error": "killed for memory" if done.returncode == -9 else f"exit code {done.returncode}: {last}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _one(asked: dict[str, Any]) -> dict[str, Any]:
    """A step of one side, measured."""
    micro, tokens = map(int, asked["batches"].split("x"))
    torch.manual_seed(0)
    ids = [torch.randint(3, 32_000, (1, tokens)).to(asked["device"]) for _ in range(micro)]
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    make = {"streamed": _streamed, "ordinary": _ordinary, "4bit": _in_4_bits, "peft": _peft}[asked["side"]]
    start = time.perf_counter()
    model, step = make(asked, batches)
    loading = {"seconds": time.perf_counter() - start, "resident": _status("VmHWM")}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    model.train()
    if asked["device"] != "cpu":
        step()  # its kernels are loaded, and the disk is read, in the first
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
    with _Memory() as memory:
        before, start = _read_bytes(), time.perf_counter()
        loss = step()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if asked["device"] != "cpu":
            torch.accelerator.synchronize()
        seconds, read = time.perf_counter() - start, _read_bytes() - before
    most = {"anonymous": memory.anonymous, "resident": memory.resident, "loading": loading}
    if asked["device"] != "cpu":
        most["accelerator"] = torch.accelerator.max_memory_allocated()
    return {"seconds": seconds, "read": read, **most, "loss": loss, "dtype": asked["dtype"]}


Made = tuple[Any, Callable[[], float]]


def _streamed(asked: dict[str, Any], batches: list[dict[str, torch.Tensor]]) -> Made:
    from hatrack.adapter.place import place
    from hatrack.base.layer_stack import find_layer_stack
    from hatrack.base.offload import move_all_but_layers, open_layers, placeholders_if_streamed
    from hatrack.layers.fast_base import speed_up
    from hatrack.layers.fast_lora import LAYER_CLASSES
    from hatrack.training.layer_streaming import LayerInputs, LayerStreaming

    base = _loaded(asked, streamed=True)
    trunk = find_layer_stack(base.model)
    move_all_but_layers(base.model, trunk, base.dtype, base.device)
    speed_up(base.model, trunk)
    with placeholders_if_streamed(base):
        model = place(base.model, RECIPE, task="complete", layer_classes=LAYER_CLASSES)
    folder = Path(asked["base"])
    window = open_layers(base.model, trunk, base.dtype, folder, base.device)
    sweep = LayerStreaming(model, window, "complete", LayerInputs(folder.parent))
    items = _items(batches)
    return model, lambda: float(sweep.step(batches, range(len(batches)), lambda batch: _loss(model, batch, items)))


def _in_4_bits(asked: dict[str, Any], batches: list[dict[str, torch.Tensor]]) -> Made:
    return _ordinary(asked, batches, quantize="4bit")


def _ordinary(asked: dict[str, Any], batches: list[dict[str, torch.Tensor]], quantize: str = "none") -> Made:
    from hatrack.adapter.place import place
    from hatrack.layers.fast_base import speed_up
    from hatrack.layers.fast_lora import LAYER_CLASSES

    base = _loaded(asked, quantize=quantize)
    speed_up(base.model)
    model = place(base.model, RECIPE, task="complete", layer_classes=LAYER_CLASSES)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    items = _items(batches)

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = _loss(model, batch, items)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    return model, step


def _peft(asked: dict[str, Any], batches: list[dict[str, torch.Tensor]]) -> Made:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"dtype": "auto", "local_files_only": True}  # mapped, as it lies there
    if asked["device"] != "cpu":
        options["device_map"] = {"": asked["device"]}
    base = AutoModelForCausalLM.from_pretrained(asked["base"], **options)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = model(**batch, use_cache=False).loss / len(batches)
            loss.backward()
            total += float(loss.detach())
        return total

    return model, step


RECIPE = Recipe.make(r=8, alpha=16.0, dropout=0.0, targets="q_proj,v_proj")


def _loaded(asked: dict[str, Any], *, streamed: bool = False, quantize: str = "none") -> Any:
    from hatrack.base.load import BaseOptions, load_base
    from hatrack.base.sources import find_base

    found, wanted = find_base(asked["base"]), {"device": asked["device"], "dtype": asked["dtype"]}
    return load_base(found, BaseOptions(task="complete", streamed=streamed, quantize=quantize, **wanted))


def _loss(model: Any, batch: dict[str, torch.Tensor], items: int) -> torch.Tensor:
    from hatrack.evaluate.loss import losses

    return losses(model, batch, "complete")[0].sum() / items


def _items(batches: list[dict[str, torch.Tensor]]) -> int:
    return sum(batch["labels"][:, 1:].numel() for batch in batches)


class _Memory:
    """Watches how much memory this process holds, and how much of it belongs to no file."""

    def __init__(self) -> None:
        self.anonymous, self.resident, self._done = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.anonymous = max(self.anonymous, _status("RssAnon"))
            self.resident = max(self.resident, _status("VmRSS"))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def written(layers: int, stored: str) -> Path:
    """The base's folder, written before where it is there already: its index comes last."""
    folder = cache_dir() / "bench" / f"llama-7b-shape-{layers}-{stored}"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, vocab_size=32_000
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], stored
    config.save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(31_997))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor
    where = {}
    for file, tensors in shards.items():
        print(f"writing {folder / file}", file=sys.stderr)
        made = {name: _filled(name, tensor, noise).to(getattr(torch, stored)) for name, tensor in tensors.items()}
        save_file(made, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def _filled(name: str, like: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Ones for norms; for matrices the same noise, begun somewhere else for each."""
    if like.ndim == 1:
        return torch.ones(like.shape)
    start = hash_of(name) % len(noise)
    repeats = -(-(like.numel() + start) // len(noise))
    return noise.repeat(repeats)[start : start + like.numel()].view(like.shape)


def hash_of(name: str) -> int:
    """The same number for the same name in every process."""
    return int.from_bytes(name.encode()[-6:], "little")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
