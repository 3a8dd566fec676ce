"""Training a base in a memory control group that it does not fit into."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from tests.cgroup import forget, group, run_in

LIMIT = 1024 * 2**20
TRAIN = """
import json, sys
import hatrack
base, data, output = sys.argv[1:]
hat = hatrack.train(base=base, data=data, output=output, name="hat", steps=2, lr=0.01, batch_size=4,
                    targets="q_proj,v_proj", dtype="float32", device="cpu")
print(json.dumps(hat.result | {"mapped": hat.base.streamed}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="control groups are Linux's")
def test_a_base_larger_than_its_memory_is_trained(tmp_path: Path, tiny_decoder: Path, questions: Path) -> None:
    """1.1 GB of float32 weights, 0.6 GB on disk as bfloat16, in 1 GiB: without a sweep the system kills the run."""
    base = tmp_path / "base"
    config = AutoConfig.from_pretrained(tiny_decoder)
    config.update({"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 10, "num_attention_heads": 12})
    config.update({"num_key_value_heads": 12, "head_dim": 128})
    with torch.device("meta"):
        made = LlamaForCausalLM(config).bfloat16()
    made = made.to_empty(device="cpu")
    for parameter in made.parameters():
        parameter.data.copy_((torch.arange(parameter.numel()) % 13 - 6).view(parameter.shape) / 200)
    made.save_pretrained(base, max_shard_size="100MB")
    del made
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((tiny_decoder / name).read_bytes())
    data = tmp_path / "few.jsonl"
    data.write_text("".join(questions.read_text().splitlines(keepends=True)[:10]))
    forget(base)
    with group(LIMIT) as folder:
        if folder is None:
            pytest.skip("no memory control group can be made here (needs root)")
        command = [sys.executable, "-c", TRAIN, str(base), str(data), str(tmp_path / "hat")]
        done = run_in(folder, command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["mapped"] and result["steps"] == 2
    assert result["eval"]["loss"] < result["before"]["loss"]
