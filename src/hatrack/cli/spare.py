"""What a command need not import: transformers and peft import some packages wherever they are installed.

They ask first whether a package is there, and do without it where it is not. So `None` in its place, which Python
takes for "not installed", spares the import. That holds for the whole process: it is for commands, whose process is
theirs alone, and never for the library. docs/log.md has the seconds.
"""

import sys
from pathlib import Path

from hatrack.recipe import Recipe
from hatrack.wheels import is_pypi


def leave_out(recipe: Recipe) -> None:
    """Leaves out what a training by `recipe` has no use for. Does nothing once transformers is imported.

    Nor for a tracker, which may want any of them, nor for a resumed run, whose recipe is not read yet.
    """
    if "transformers" in sys.modules or recipe.report_to != "none" or recipe.resume:
        return
    unused: set[str] = set()
    if recipe.quantize == "none":
        unused |= {"bitsandbytes", "scipy"}  # transformers uses the second for losses of object detection
    sources = (str(source) for source in (recipe.data, recipe.eval_data) if source is not None)
    if all(is_pypi(source) or Path(source).is_file() for source in sources):
        unused.add("datasets")  # and with it pandas
    for name in unused:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
