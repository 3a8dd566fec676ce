"""Describes a finished run: hatrack.json, extra files in the adapter's folder, train's result."""

import json
from typing import Any

from hatrack.adapter.card import AdapterCard
from hatrack.base.load import Base
from hatrack.check.prepared import Prepared
from hatrack.data import trained_rows
from hatrack.inference.generate import all_end_tokens
from hatrack.training.loop import Trained
from hatrack.training.run import Run


def adapter_card(run: Run, prepared: Prepared, trained: Trained, cost: dict[str, Any]) -> AdapterCard:
    """Makes the content of hatrack.json. `cost` comes from `CostMeter.measure`."""
    examples, tokens = prepared.examples, prepared.tokens
    return AdapterCard(
        name=run.name,
        base=dict(prepared.base_record),
        task=examples.task,
        labels=examples.labels,
        multi_label=examples.multi_label,
        template=tokens.template,
        end_tokens=list(tokens.end_tokens),
        stop_strings=list(tokens.stops.strings),
        max_length=tokens.max_length,
        recipe=prepared.recipe.explicit_options(),
        data={
            "source": str(prepared.recipe.data),
            "rows": len(tokens.train),
            "held_out": len(tokens.held_out),
            "digest": examples.digest,
        },
        metrics={"before": trained.before.metrics, "after": trained.after.metrics},
        cost={"planned": trained.plan.as_json(), "actual": cost},
    )


def extra_adapter_files(run: Run, prepared: Prepared, base: Base) -> dict[str, bytes | str]:
    """Makes the files saved with an adapter (name -> content): metrics, digests of its rows, generation settings."""
    files: dict[str, bytes | str] = {
        "metrics.jsonl": run.metrics.read_bytes(),
        trained_rows.FILE: trained_rows.to_bytes(trained_rows.row_and_turn_keys(prepared.examples.train)),
    }
    if prepared.task != "classify":
        files["generation_config.json"] = _generation_config(prepared, base)
    return files


def _generation_config(prepared: Prepared, base: Base) -> str:
    """For plain transformers and vLLM: the base's own settings, with the end tokens of the adapter's answers."""
    tokens, settings = prepared.tokens, base.model.generation_config.to_diff_dict()
    settings.pop("_from_model_config", None)  # with it, transformers would replace these settings by the config's
    settings["eos_token_id"] = all_end_tokens(base, tokens.end_tokens)
    settings["pad_token_id"] = base.tokenizer.pad_token_id
    if tokens.stops.strings:
        settings["stop_strings"] = list(tokens.stops.strings)
    return json.dumps(settings, indent=2) + "\n"


def run_result(run: Run, trained: Trained, model: Any) -> dict[str, Any]:
    """Makes what `hatrack train --json` prints, except the costs, which are measured at the very end.

    `seconds` are those of training and scoring, without loading and sample answers.
    """
    trainable, total = model.get_nb_trainable_parameters()
    return {
        "adapter": str(run.output),
        "name": run.name,
        "trainable": trainable,
        "total": total,
        "seconds": round(trained.seconds, 3),
        "steps": trained.steps,
        "tokens": trained.tokens,
        "tokens_per_second": round(trained.tokens_per_second, 1),
        "train_loss": trained.train_loss,
        "before": trained.before.metrics,
        "eval": trained.after.metrics,
        "planned": {"steps": trained.schedule.steps, **trained.plan.as_json()},
    }
