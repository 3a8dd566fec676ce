"""What the stack below hatrack lets through in silence, fed to hatrack: each is caught, with what, got and fix.

The first part holds peft to what is claimed of it, where that is cheap: a table of evidence is to be true.
"""

import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import hatrack
from hatrack.adapter.place import place
from hatrack.base.load import BaseOptions, load_base
from hatrack.base.sources import find_base
from hatrack.check.folder import check_adapter
from hatrack.data.batch import collate
from hatrack.errors import AdapterError, HatrackError, ModelError, RecipeError, TargetError
from hatrack.recipe import Recipe
from tests.base import tiny

QUICK = {"device": "cpu", "dtype": "float32", "batch_size": 8}


def _refused(error: type[HatrackError], tmp_path: Path, base: Path, data: Path, **options: Any) -> HatrackError:
    """What hatrack.train says before it begins. Nothing may be left behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as raised:
        hatrack.train(base=str(base), data=str(data), **({"output": str(tmp_path / "new")} | QUICK | options))
    assert sorted(tmp_path.rglob("*")) == before
    return raised.value


def _parts(error: HatrackError) -> tuple[str, str, str]:
    return error.what, str(error.got), str(error.fix)


def test_one_of_two_target_names_is_wrong(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny.model("Bert"), LoraConfig(r=2, target_modules=["query", "vaule"]))  # not a word
    error = _refused(TargetError, tmp_path, tiny_encoder, reviews, targets="query,vaule")
    assert _parts(error) == (
        "'vaule' matches no layer (did you mean value?)",
        "a model with dense, key, query, value",
        "use those names, or --targets auto",
    )


def test_all_target_names_are_wrong(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    with pytest.raises(ValueError, match="not found in the base model") as pefts:
        get_peft_model(tiny.model("Bert"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert "query" not in str(pefts.value)  # the names there are
    error = _refused(TargetError, tmp_path, tiny_encoder, reviews, targets="q_proj,v_proj")
    assert "'q_proj' matches no layer" in error.what and "'v_proj' matches no layer" in error.what
    assert error.got == "a model with dense, key, query, value" and error.fix == "use those names, or --targets auto"


def test_a_typing_error_in_modules_to_save(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    model = tiny.model("Bert", "classify", num_labels=2)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["clasifier"]))
    assert not any("classifier" in name for name, p in peft.named_parameters() if p.requires_grad)
    with pytest.raises(RecipeError, match="there is no option 'modules_to_save'"):  # hatrack derives them
        Recipe.make(modules_to_save="clasifier")
    peft.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    told = {"task_type": "SEQ_CLS", "base_model_name_or_path": "acme/base"}  # what peft does not know of a bare model
    config.write_text(json.dumps(json.loads(config.read_text()) | told))
    found = {finding.gotcha: finding for finding in check_adapter(tmp_path / "adapter")}["modules-to-save-unknown"]
    assert found.refused and "names modules to save that are not in it" in found.what
    assert found.got == "clasifier in modules_to_save, no such tensors" and "correct the name" in found.fix


def test_alpha_0(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        hatrack.train(base=str(tiny_encoder), data=str(reviews), alpha=0)
    assert str(raised.value) == "--alpha must be greater than 0; got 0; fix: leave it out for 2 x r"


def test_r_larger_than_the_layer(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    error = _refused(RecipeError, tmp_path, tiny_encoder, reviews, r=33)
    what, got, fix = _parts(error)
    assert what.startswith("--r is larger than ") and what.endswith(" is wide")
    assert (got, fix) == ("33 and 32", "at most --r 32")


def test_a_generators_task_on_a_classifier(tmp_path: Path, tiny_encoder: Path, questions: Path) -> None:
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        get_peft_model(
            tiny.model("Bert", "classify", num_labels=2), LoraConfig(task_type="CAUSAL_LM", target_modules=["query"])
        )
    error = _refused(ModelError, tmp_path, tiny_encoder, questions, task="chat")
    assert error.what == f"{tiny_encoder} (bert) is an encoder: it cannot generate text"
    assert (error.got, error.fix) == ("--task chat", "use --task classify, or a causal base such as a Llama")


def test_a_classifier_always_has_a_task_type(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    """Without one peft trains and saves no head. hatrack cannot be asked for that; one made elsewhere is found."""
    with pytest.raises(RecipeError, match="there is no option 'task_type'"):
        Recipe.make(task_type=None)
    base = load_base(find_base(str(tiny_encoder)), BaseOptions(task="classify", labels=["no", "yes"], device="cpu"))
    recipe = Recipe.make(base=str(tiny_encoder), data=str(reviews))
    model = place(base.model, recipe, task="classify")
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert any("classifier" in name for name, p in model.named_parameters() if p.requires_grad)
    foreign = get_peft_model(tiny.model("Bert", "classify", num_labels=2), LoraConfig(r=2, target_modules=["query"]))
    foreign.save_pretrained(tmp_path / "adapter")
    found = {finding.gotcha: finding for finding in check_adapter(tmp_path / "adapter")}["head-not-saved"]
    assert "does not say what the adapter is for" in found.what and "task_type None" in found.got
    assert "SEQ_CLS" in found.fix and found.refused


def test_a_classifiers_task_on_a_causal_model(tmp_path: Path, tiny_decoder: Path, reviews: Path) -> None:
    """peft puts SEQ_CLS on a causal model without a word; hatrack gives the base a classifier's head instead."""
    causal = tiny.model("Llama", "causal")
    get_peft_model(causal, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    hat = hatrack.train(
        base=str(tiny_decoder), data=str(reviews), output=str(tmp_path / "hat"), name="hat", steps=2, **QUICK
    )
    assert type(hat.base.model).__name__ == "LlamaForSequenceClassification"
    with pytest.raises(AdapterError) as raised:
        load = load_base(find_base(str(tiny_decoder)), BaseOptions(task="chat", device="cpu"))
        hatrack.adapter.attach.attach(load.model, tmp_path / "hat", "hat")
    what, got, fix = _parts(raised.value)
    assert what.endswith("is a classifier's adapter") and got == "a base loaded as LlamaForCausalLM"
    assert fix == "load the base to classify"


def test_a_learning_rate_that_changes_nothing(
    tmp_path: Path, tiny_encoder: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1e-8 for 20 steps: said before the first step, and again by what the run measures."""
    with suppress(HatrackError):  # an adapter that changes nothing may be refused at the end
        hatrack.train(
            base=str(tiny_encoder), data=str(reviews), output=str(tmp_path / "hat"), lr=1e-8, steps=20, **QUICK
        )
    said = capsys.readouterr().err
    before, _, after = said.partition("before training:")
    assert "advice: the learning rate is so low that 20 steps will change almost nothing; got --lr 1e-08" in before
    assert "fix: --lr 0.0015, or --lr auto to measure it [learning-rate-timid]" in before
    assert after.count("the held-out loss has barely moved") == 1 and "before a larger --r" in after


def test_an_adapter_loaded_for_use_is_not_trained(tmp_path: Path, tiny_encoder: Path, reviews: Path) -> None:
    """peft loads adapters frozen; training such a model ends in torch's "does not require grad"."""
    hat = hatrack.train(
        base=str(tiny_encoder), data=str(reviews), output=str(tmp_path / "hat"), name="hat", steps=2, **QUICK
    )
    assert not any(parameter.requires_grad for parameter in hat.model.parameters())
    with pytest.raises(AdapterError) as placed:
        place(hat.model, Recipe.make(base=str(tiny_encoder), data=str(reviews)), task="classify")
    what, got, fix = _parts(placed.value)
    assert what == "the base already has an adapter" and got == "PeftModelForSequenceClassification"
    assert fix == "start from the bare base"
    error = _refused(ModelError, tmp_path, tmp_path / "hat", reviews, name="again")
    assert error.what == f"{tmp_path / 'hat'} is an adapter, not a base"
    assert error.got == "adapter_config.json" and error.fix == f"use its base: {tiny_encoder}"


def test_padding_that_is_the_end_token_is_masked_by_place() -> None:
    ends = [(np.array([5, 6, 3]), np.ones(3, dtype=bool), None), (np.array([5, 3]), np.ones(2, dtype=bool), None)]
    labels = collate(ends, 3, "complete")["labels"]
    assert labels.tolist() == [[5, 6, 3], [5, 3, -100]]


def test_every_label_masked(tmp_path: Path, tiny_decoder: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{'so ' * 60}{n}", "completion": "red"}) + "\n" for n in range(4)))
    error = _refused(HatrackError, tmp_path, tiny_decoder, data, task="chat")
    assert "the answer begins after the 64 tokens that are kept" in error.what and "tokens" in str(error.fix)


def test_merging_21_times_leaves_the_base_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny.model("Llama", "causal").to(torch.bfloat16)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = hatrack.get_peft_model(base, config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(21):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
