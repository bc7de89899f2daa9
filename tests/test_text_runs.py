"""``kd train`` on text: each task end to end, and what transformers makes of the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file

from kd.cli.main import main
from kd.config.composition import CONF
from kd.distill.distiller import Distiller
from tests.tiny_language import BERT, LLAMA, VOCABULARY, Texts

KINDS = {
    "causal_lm": (LLAMA, transformers.AutoModelForCausalLM, ["loss=[ce,kd]"]),
    "masked_lm": (BERT, transformers.AutoModelForMaskedLM, ["loss=[ce,kd]"]),
    "text_classification": (BERT, transformers.AutoModelForSequenceClassification, ["loss=[ce,kd]"]),
    "embedding": (
        BERT,
        transformers.AutoModel,
        ["loss=[hint]", "loss.hint.student_taps=[pooled]", "loss.hint.teacher_taps=[pooled]"],
    ),
}


def arguments(kind: str, run: Path, *more: str) -> list[str]:
    """Two epochs; the student has two of its teacher's four layers."""
    config, _, loss = KINDS[kind]
    inside = ",".join(f"{key}: {value}" for key, value in config.items())
    return [
        *("train", f"task={kind}", "~data", "+data._target_=tests.tiny_language.Texts", f"+data.kind={kind}"),
        *(
            "model@student=none",
            "student.surgery.layers=2",
            "model@teacher=transformers",
            "hardware=cpu",
            "hardware.threads=1",
        ),
        *("teacher.model.pretrained=false", f"teacher.model.config={{{inside}}}", "teacher.allow_random=true"),
        *("recipe.epochs=2", "recipe.batch_size=8", f"hydra.run.dir={run}", *loss, *more),
    ]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code = main(list(argv))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def test_the_small_bert_of_the_package() -> None:
    node = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "bert_tiny.yaml"))["model"]
    network = instantiate(node, architecture="sequence_classification", num_classes=6)
    layers = sum(p.numel() for p in network.bert.encoder.parameters())
    assert layers == 4 * (4 * (128 * 128 + 128) + 128 * 512 + 512 + 512 * 128 + 128 + 4 * 128)
    assert network.classifier.out_features == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_what_transformers_loads_of_it(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "run"
    said = run(capsys, *arguments(kind, where))
    record = json.loads((where / "result.json").read_text())
    outputs = {"text_classification": "; 3 classes, ?/", "embedding": " factor); ? (0"}
    assert outputs.get(kind, f"; vocabulary of {VOCABULARY}, ?/") in said
    main_metric = record["metrics"][0]["name"]
    assert record["protocol"]["monitor"] == f"val/{main_metric}"
    assert record["student"]["parameters"] < record["teacher"]["parameters"]
    evaluated = kind != "embedding"
    inputs = Texts(kind).drawn("test").inputs
    for folder, file in {"selected": "student.safetensors", "last": "student_last.safetensors"}.items():
        loaded, about = KINDS[kind][1].from_pretrained(where / folder, output_loading_info=True)
        assert not any(about.values()), about
        weights = load_file(where / file)
        prefix = "encoder." if kind == "embedding" else ""
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, weights[prefix + name]), name
        assert loaded(**inputs)[0].isfinite().all()
        if kind == "text_classification":
            assert loaded.config.id2label == {0: "0", 1: "1", 2: "2"}
    if evaluated:
        run(capsys, "eval", f"run={where}", f"out={tmp_path / 'found.json'}")
        found = json.loads((tmp_path / "found.json").read_text())["metrics"][main_metric]
        assert found == pytest.approx(record["student"]["selected"]["test"][main_metric], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_of_tokens_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(capsys, *arguments("causal_lm", whole, "recipe.epochs=3"))
    begin = Distiller.on_train_epoch_start

    def stop(self: Distiller) -> None:
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, "on_train_epoch_start", stop)
        assert main(arguments("causal_lm", cut, "recipe.epochs=3")) != 0
    shutil.rmtree(cut / "selected")  # it is written anew
    run(capsys, "train", f"resume={cut}")
    ended = [json.loads((place / "result.json").read_text())["student"] for place in (whole, cut)]
    assert ended[0]["last"]["digest"] == ended[1]["last"]["digest"]
    assert ended[0]["selected"]["test"] == ended[1]["selected"]["test"]
    transformers.AutoModelForCausalLM.from_pretrained(cut / "selected")


def test_a_student_teaches_the_next_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights file says which network it is: neither the teacher nor its configuration is needed again."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(capsys, *arguments("text_classification", first))
    given = [a for a in arguments("text_classification", second) if not a.startswith(("model@teacher", "teacher."))]
    run(capsys, *[a.replace("layers=2", "layers=1") for a in given], f"teacher.checkpoint={first}")
    record = json.loads((second / "result.json").read_text())
    before = json.loads((first / "result.json").read_text())
    assert record["teacher"]["parameters"] == before["student"]["parameters"]
    assert record["teacher"]["test"]["acc1"] == pytest.approx(before["student"]["selected"]["test"]["acc1"])


@pytest.mark.slow
def test_low_rank_matrices_are_trained_and_added_for_those_who_load_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "run"
    inside = ",".join(f"{key}: {value}" for key, value in BERT.items())
    given = [a for a in arguments("text_classification", where) if "surgery" not in a and "teacher" not in a]
    given = [a.replace("model@student=none", "model@student=transformers").replace("[ce,kd]", "[ce]") for a in given]
    lora = ["student.model.pretrained=false", f"student.model.config={{{inside}}}", "student.model.lora={r: 2}"]
    run(capsys, *given, *lora)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(where / "selected")
    weights = load_file(where / "student.safetensors")
    own = next(name for name in weights if "lora_B" in name and weights[name].any())
    assert own
    inputs = Texts("text_classification").drawn("test")
    accuracy = (loaded.eval()(**inputs.inputs).logits.argmax(1) == inputs.targets).double().mean()
    record = json.loads((where / "result.json").read_text())
    assert float(accuracy) == pytest.approx(record["student"]["selected"]["test"]["acc1"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"student.surgery.layers=2": "student.surgery.layers=9"}, "student.surgery: layers = 9 is not allowed"),
        ({"student.surgery.layers=2": "student.surgery.keep=some"}, "student.surgery.keep = some is not allowed"),
        ({"model@student=none": "model@student=mlp"}, "needs a student that is made from its teacher"),
        ({"student.surgery.layers=2": "seed=1"}, "student.model=null cannot be set: student.model has no _target_"),
        ({"model@teacher=transformers": "model@teacher=none"}, "teacher.model has no _target_: choose a network"),
        ({"task=causal_lm": "task=classification"}, "architecture = None is not allowed"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    change: dict[str, str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [change.get(argument, argument) for argument in arguments("causal_lm", tmp_path / "run")]
    assert main(given) == 1
    assert sentence in capsys.readouterr().err


def test_a_network_that_is_not_here_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://nowhere.invalid")
    given = [a for a in arguments("causal_lm", tmp_path / "run") if "surgery" not in a and not a.startswith("teacher")]
    given = [a.replace("student=none", "student=transformers") for a in given if "model@teacher" not in a]
    assert main([*given, "student.model.name=nobody/nothing", "loss=[ce]"]) == 1
    assert "name = nobody/nothing cannot be had of transformers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "network", "said"),
    [
        (
            ["data=lm", "task=causal_lm", "data.length=64"],
            "{model_type: gpt2, n_positions: 32, n_embd: 16, n_head: 2}",
            "length = 64",
        ),
        (
            ["data=text", "data.label=label", "task=text_classification", "data.max_length=64"],
            "{model_type: bert, hidden_size: 16, num_attention_heads: 2, max_position_embeddings: 32}",
            "max_length = 64",
        ),
    ],
)
def test_rows_that_a_network_has_no_positions_for(
    data: list[str], network: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [" ".join(f"w{(i * j) % 17}" for j in range(1, 9)) for i in range(60)]
    if data[0] == "data=lm":
        rows = [json.dumps({"text": text}) for text in words]
    else:
        rows = [json.dumps({"text": text, "label": "ab"[i % 2]}) for i, text in enumerate(words)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    files = [f"data.train={tmp_path / 'rows.jsonl'}", "data.test_fraction=0.2", "data.val_fraction=0.2"]
    config = f"student.model.config={network}"
    where = ["hardware=cpu", "recipe=finetune", "recipe.epochs=1", f"hydra.run.dir={tmp_path / 'run'}"]
    assert main(["train", *data, *files, "model@student=transformers", config, *where]) == 1
    printed = capsys.readouterr().err
    assert f"data.{said} is not allowed: rows may have 64 tokens, the student takes 32: set data." in printed
