"""What cannot serve stops `vllm serve` at once, with one sentence and a status other than 0.

That each method serves or is refused by name is tested without vLLM, in
`tests/integrations/vllm/test_policy.py`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoints import text_config
from serving import refused

from vlmprune.integrations.vllm import VARIABLE

# Spec, more arguments, and what the sentence names.
STARTS = {
    "no such setting": ("vispruner:kept=64", (), ("kept",)),
    "no method for servers": ("plphp:r=0.4", (), ("plphp", "vispruner", "divprune")),
    "a budget in the server's arguments": (
        "vispruner:keep=8",
        ('--mm-processor-kwargs={"vlmprune_keep": 4}',),
        ("--mm-processor-kwargs", "vlmprune_keep"),
    ),
    "no model with images": ("vispruner:keep=8", (), ("LlamaForCausalLM",)),
}


@pytest.fixture(scope="module")
def stopped(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit status and output of each start; two at a time."""
    text = tmp_path_factory.mktemp("text")
    config = text_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(text)
    for file in tiny.glob("tokenizer*"):
        (text / file.name).write_bytes(file.read_bytes())

    def start(name: str) -> tuple[int, str]:
        spec, arguments, _ = STARTS[name]
        return refused(text if name == "no model with images" else tiny, spec, *arguments)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(STARTS, pool.map(start, STARTS), strict=True))


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_refused_in_a_sentence(stopped, name: str) -> None:
    status, output = stopped[name]
    assert status not in (0, None)
    assert "Traceback" not in output, output[-3000:]
    said = [line for line in output.splitlines() if f"{VARIABLE}: " in line]
    assert len(said) == 1, output[-3000:]
    assert said[0].rstrip().endswith(".")
    for word in STARTS[name][2]:
        assert word in said[0]
    # Before any work: no engine was started.
    assert "Initializing a V1 LLM engine" not in output
