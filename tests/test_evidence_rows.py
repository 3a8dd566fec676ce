"""What the stack below hatrack lets through in silence, row by row, and the test that feeds it to hatrack.

The rows stand here by name, so that a missing one can be seen; a test here is one that asserts what, got and fix.
"""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = {
    "one of two target names wrong": "test_evidence.py::test_one_of_two_target_names_is_wrong",
    "all target names wrong": "test_evidence.py::test_all_target_names_are_wrong",
    "a typo in modules_to_save": "test_evidence.py::test_a_typing_error_in_modules_to_save",
    "alpha=0": "test_evidence.py::test_alpha_0",
    "r larger than the layer": "test_evidence.py::test_r_larger_than_the_layer",
    "CAUSAL_LM on a classifier": "test_evidence.py::test_a_generators_task_on_a_classifier",
    "no task_type on a classifier": "test_evidence.py::test_a_classifier_always_has_a_task_type",
    "SEQ_CLS on a causal LM": "test_evidence.py::test_a_classifiers_task_on_a_causal_model",
    "a SEQ_CLS adapter on a causal base": (
        "test_evidence_adapters.py::test_a_classifiers_adapter_on_a_causal_base_and_the_other_way_round"
    ),
    "a base of the same shapes with other weights": (
        "test_evidence_adapters.py::test_a_base_of_the_same_shapes_with_other_weights"
    ),
    "another base name": "test_evidence_adapters.py::test_another_bases_name",
    "a base with fewer layers": "test_evidence_adapters.py::test_a_base_with_fewer_layers",
    "missing keys": "test_evidence_adapters.py::test_missing_keys",
    "missing weights file": "test_evidence_adapters.py::test_no_weights_file",
    "truncated or empty safetensors": "test_evidence_adapters.py::test_a_cut_or_empty_weights_file",
    'malformed adapter_config.json, no peft_type, "r": "4"': "test_evidence_adapters.py::test_a_malformed_config",
    "NaN in the adapter": "test_evidence_adapters.py::test_numbers_that_are_none",
    "lr 1e-8 for 20 steps": "test_evidence.py::test_a_learning_rate_that_changes_nothing",
    "a default-loaded adapter, then trained": "test_evidence.py::test_an_adapter_loaded_for_use_is_not_trained",
    "subfolder ../A; adapter name /abs/path": (
        "test_evidence_adapters.py::test_names_and_paths_that_lead_out_of_the_folder"
    ),
    "a slow regular expression in adapter_config.json": (
        "test_evidence_adapters.py::test_a_regular_expression_without_end"
    ),
    "merging and un-merging 21 times in bf16": "test_evidence.py::test_merging_21_times_leaves_the_base_bit_for_bit",
}
NO_MESSAGE = {"merging and un-merging 21 times in bf16"}
"""What goes right here, so that there is nothing to say."""


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_its_test(row: str) -> None:
    file, _, name = ROWS[row].partition("::")
    functions = {
        node.name: node for node in ast.parse((HERE / file).read_text()).body if isinstance(node, ast.FunctionDef)
    }
    assert name in functions
    looked_at = ast.unparse(functions[name])
    parts = (
        "_parts(" in looked_at
        or "str(raised.value) ==" in looked_at
        or "; got " in looked_at
        or "got --lr" in looked_at
    )
    each = all(f".{part}" in looked_at for part in ("what", "got", "fix"))
    assert parts or each or row in NO_MESSAGE, f"{name} does not assert what, got and fix"
