"""Makes the README's pictures.

    .venv/bin/python docs/pictures/make.py train    a real run of `hatrack train`, as a terminal shows it -> train.svg
    .venv/bin/python docs/pictures/make.py speed    the first table of docs/performance.md as bars -> speed.svg

Needs the `bench` extra (matplotlib). Run it in the repository.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMMANDS = [
    ["train", "recipes/classify.yaml", "--epochs", "6"],
    ["predict", "tickets", "The parcel never came."],
]
WIDTH = 118


def train() -> None:
    """Runs the commands in a copy of recipes/ and draws what they print."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipes").symlink_to(ROOT / "recipes")
        environment = dict(os.environ, HATRACK_HOME=f"{folder}/home")
        for words in COMMANDS:
            shown = " ".join(f'"{word}"' if " " in word else word for word in words)
            console.print(Text(f"$ hatrack {shown}", style="bold"))
            line = [sys.executable, "-m", "hatrack", *words]
            done = subprocess.run(
                line,
                cwd=folder,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=True,
            )
            console.print(Text(done.stdout.rstrip("\n")))
    svg = console.export_svg(title="hatrack")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S)  # drawn with the reader's own fonts: nothing is fetched
    (HERE / "train.svg").write_text(svg)


def speed() -> None:
    """Draws how much faster than peft a step is, from the page's own table."""
    import matplotlib.pyplot as plt

    text = (ROOT / "docs" / "performance.md").read_text().split("## On a CPU without them")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) s \| ([\d.]+)x \|", text, flags=re.M)
    names = [name for name, _, _ in rows]
    ours = [float(seconds) for _, seconds, _ in rows]
    theirs = [float(seconds) * float(ratio) for _, seconds, ratio in rows]
    figure, axes = plt.subplots(figsize=(9, 0.8 * len(rows) + 1.2))
    places = range(len(rows))
    for offset, values, name, colour in ((-0.2, ours, "hatrack", "#1b7837"), (0.2, theirs, "peft", "#9e9e9e")):
        bars = axes.barh([place + offset for place in places], values, 0.38, label=name, color=colour)
        axes.bar_label(bars, fmt="%.1f s", padding=3)
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a training step; 2 cores of an AMD EPYC, bfloat16; shorter is better")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(HERE / "speed.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    {"train": train, "speed": speed}[sys.argv[1]]()
