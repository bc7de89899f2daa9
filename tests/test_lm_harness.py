"""``kd eval RUN lm_eval=…``: the lm-evaluation-harness on a tiny network and a task of three questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from kd.cli.main import main
from tests.tiny_language import LLAMA

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "two", "and", "is", "four", "five", "six", "three"]
QUESTIONS = [
    {"question": "two and two is", "choices": ["four", "five"], "answer": 0},
    {"question": "two and three is", "choices": ["four", "five"], "answer": 1},
    {"question": "three and three is", "choices": ["six", "five"], "answer": 0},
]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a run's, with a network in ``selected/``."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "vocab_size": len(WORDS)})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "run" / "selected")
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(tmp_path / "run" / "selected")
    return tmp_path / "run"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task of the harness."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "sums.yaml").write_text(TASK.format(file=folder / "sums.jsonl"))
    return folder


def right(run: Path) -> list[bool]:
    """Whether the network prefers the right choice, computed here."""
    network = transformers.AutoModelForCausalLM.from_pretrained(run / "selected").eval()
    ids = {word: n for n, word in enumerate(WORDS)}
    found = []
    for row in QUESTIONS:
        prompt = torch.tensor([[ids[word] for word in str(row["question"]).split()]])
        with torch.no_grad():
            logits = network(prompt).logits[0, -1]
        scores = [float(logits[ids[choice]]) for choice in row["choices"]]  # type: ignore[attr-defined]
        found.append(scores.index(max(scores)) == row["answer"])
    return found


@pytest.mark.slow  # the harness takes eight seconds to import
# of the harness and what it imports: files it leaves open, names that its libraries will drop
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_ones_own(run: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["eval", str(run), "lm_eval=sums", f"lm_eval_folder={task}"]
    assert main([*common, f"out={tmp_path / 'found.json'}"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    expected = sum(right(run)) / 3
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tasks"]["sums"]["acc"]["value"] == pytest.approx(expected)
    assert found["source"] == str(run / "selected")
    assert f"{expected:.4f}" in printed
    assert main([*common, "lm_eval_limit=1", f"out={tmp_path / 'one.json'}"]) == 0
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["tasks"]["sums"]["acc"]["value"] == float(right(run)[0])
    capsys.readouterr()
    assert main(["eval", str(run), "lm_eval=sum", f"lm_eval_folder={task}"]) == 1
    assert "lm_eval = sum is not allowed" in (said := capsys.readouterr().err)
    assert "sums" in said


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("lm_eval=[]", ["lm_eval = []"]),
        ("lm_eval_folder=no", ["lm_eval_folder = no"]),
        ("lm_eval_limit=0", ["lm_eval_limit = 0", "1 or more"]),
        ("data.batch_size=2", ["data.batch_size=2", "selected/"]),
        ("who=teacher", ["lm_eval", "give RUN"]),
    ],
)
def test_what_it_cannot_do_is_one_sentence(
    argument: str, words: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), *([] if argument.startswith("lm_eval=") else ["lm_eval=sums"]), argument]) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
