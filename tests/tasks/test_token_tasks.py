"""Masked and causal language modelling: rows, shift, hidden states before the output projection, metrics."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from kd.errors import KdError
from kd.losses.base import UNLABELLED, Batch, Output
from kd.models.transformers_model import transformers_model
from kd.models.vocabulary import restrict
from kd.tasks.base import Want
from kd.tasks.output_projection import hidden_rows, linear_of
from kd.tasks.tokens import FEW, CausalLM, MaskedLM, Tokens
from tests.tiny_language import BERT, LLAMA, VOCABULARY, Texts, sequences

NETWORKS = {  # with what is special about their output projection
    "llama": (LLAMA, "causal_lm"),
    "gpt2": ({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}, "causal_lm"),
    "gemma2": ({**LLAMA, "model_type": "gemma2", "head_dim": 16}, "causal_lm"),  # soft-capped
    "cohere": ({**LLAMA, "model_type": "cohere"}, "causal_lm"),  # scaled
    "bert": (BERT, "masked_lm"),  # a transform before it
    "distilbert": ({"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}, "masked_lm"),
    "modernbert": ({**BERT, "model_type": "modernbert"}, "masked_lm"),
}
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}


def network(name: str) -> torch.nn.Module:
    config, architecture = NETWORKS[name]
    return transformers_model(config={**config, **SPECIAL, "sep_token_id": 2}, architecture=architecture).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_rows_give_the_networks_own_logits(name: str) -> None:
    made, inputs = network(name), sequences(4)
    positions = torch.tensor([0, 5, 13, 40])
    found = hidden_rows(made, inputs, positions)
    assert found is not None
    hidden, head = found
    whole = made(**inputs).logits.flatten(0, 1)[positions]
    torch.testing.assert_close(head(hidden), whole, rtol=1e-5, atol=1e-6)
    assert hidden.shape[0] == 4
    assert linear_of(head) is head.projection
    assert (head.scale, head.softcap) != (1.0, None) or name not in ("gemma2", "cohere")
    assert "forward" not in head.projection.__dict__  # nothing is left of the way it was done


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_are_selected_where_a_text_is_padded_on_the_left(name: str) -> None:
    """Longer than the comparison reads, which sees nothing but padding there."""
    made, inputs = network(name), sequences(2, length=24)
    inputs["attention_mask"][:, :20] = 0
    assert hidden_rows(made, inputs, torch.tensor([22, 23])) is not None


@pytest.mark.parametrize("task", [CausalLM(), MaskedLM()], ids=["causal", "masked"])
def test_a_dry_pass_has_few_rows_and_whole_texts(task: Tokens) -> None:
    texts = sequences(4, length=40)
    whole = Batch(texts, texts["input_ids"].clone(), torch.arange(4), texts["attention_mask"].bool())
    few = task.rows(task.few(whole))
    assert few.inputs["input_ids"].shape == (2, 40)
    assert len(few.targets) == 2 * (FEW - task.shift)
    assert task.few(Batch(texts, None)).targets is None
    beside = Batch(texts, whole.targets, whole.index, whole.mask, {"teacher": whole})
    assert torch.equal(task.few(beside).targets, whole.targets[:2])  # the parts that two tokenizers share go on


def test_gradients_reach_the_network_as_by_its_own_logits() -> None:
    made, batch = network("llama"), CausalLM().rows(Texts("causal_lm").drawn("train"))
    output = CausalLM().answer(made, batch.inputs, batch, Want())
    F.cross_entropy(output.logits, batch.targets).backward()
    ours = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    targets = torch.where(batch.inputs["attention_mask"].bool(), Texts("causal_lm").drawn("train").targets, UNLABELLED)
    logits = made(**batch.inputs).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=UNLABELLED).backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_network_of_another_kind_answers_whole_and_the_rows_are_chosen_of_it() -> None:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.table(input_ids)

    made, batch = Table(), CausalLM().rows(Texts("causal_lm").drawn("train"))
    output = CausalLM().answer(made, batch.inputs, batch, Want())
    assert output.logits.shape == (len(batch.targets), VOCABULARY)
    assert torch.equal(output.logits, made(**batch.inputs).flatten(0, 1)[batch.extra["positions"]])


def test_causal_rows_are_shifted_once_and_neither_prompt_nor_padding_is_one() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    targets = torch.tensor([[-100, -100, 7, 8, 9], [-1, -1, 7, 0, 0]])  # behind a prompt of two; pads are ids
    batch = CausalLM().rows(Batch({"input_ids": ids, "attention_mask": mask}, targets, extra={"bytes": ids}))
    assert batch.extra["positions"].tolist() == [1, 2, 3, 6]
    assert batch.targets.tolist() == [7, 8, 9, 7]
    assert batch.extra["row_bytes"].tolist() == [7, 8, 9, 7]
    again = CausalLM().rows(batch)  # a second pass changes nothing
    assert again.targets.tolist() == [7, 8, 9, 7]


def test_all_real_positions_count_where_they_are_asked_for() -> None:
    ids = torch.tensor([[5, 1, 7, 0]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    targets = torch.tensor([[-1, 6, -1, -1]])
    few, all_real = MaskedLM().rows(Batch(inputs, targets)), MaskedLM(rows="real").rows(Batch(inputs, targets))
    assert (few.targets.tolist(), all_real.targets.tolist()) == ([6], [-1, 6, -1])
    assert int(MaskedLM().labelled(all_real)) == 1
    causal = CausalLM(rows="real").rows(Batch(inputs, targets))
    assert causal.extra["positions"].tolist() == [0, 1]  # what follows position 2 is padding
    with pytest.raises(ValueError, match="rows = all is not allowed: it must be supervised or real"):
        MaskedLM(rows="all")


@pytest.mark.parametrize("task", [MaskedLM(), CausalLM()])
def test_a_batch_with_nothing_supervised_is_refused(task: Tokens) -> None:
    inputs = sequences(2)
    with pytest.raises(KdError, match="no supervised position"):
        task.rows(Batch(inputs, torch.full_like(inputs["input_ids"], -100)))


def test_metrics_are_those_of_the_labelled_rows_by_hand() -> None:
    drawn = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 5, generator=drawn, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([0, 1, UNLABELLED, 3, 4, UNLABELLED])
    batch = Batch({"input_ids": targets}, targets, extra={"row_bytes": torch.tensor([1, 2, 90, 4, 5, 90])})
    meter = CausalLM().meter(5)
    for part in (slice(0, 3), slice(3, 6)):
        few = Batch(batch.inputs, targets[part], extra={"row_bytes": batch.extra["row_bytes"][part]})
        meter.update(Output(student[part]), few, Output(teacher[part]))
    found, kept = meter.compute(True), targets >= 0
    nll = F.cross_entropy(student[kept], targets[kept], reduction="none")
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    assert found == pytest.approx(
        {
            "nll": float(nll.mean()),
            "perplexity": math.exp(float(nll.mean())),
            "bpb": float(nll.sum()) / math.log(2) / 12,
            "acc1": float((student[kept].argmax(1) == targets[kept]).double().mean()),
            "agreement": float((student.argmax(1) == teacher.argmax(1)).double().mean()),
            "kl": float((log_t.exp() * (log_t - log_s)).sum(1).mean()),
        },
        rel=1e-5,
    )
    alone = CausalLM().meter(5)
    alone.update(Output(student[:2]), Batch({"input_ids": targets[:2]}, targets[:2]))
    assert set(alone.compute(False)) == {"nll", "perplexity", "acc1"}  # the data says nothing of bytes


def test_vocabularies_that_do_not_belong_together() -> None:
    task, wide, narrow = CausalLM(), Output(torch.zeros(1, 12)), Output(torch.zeros(1, 10))
    task.agree(wide, wide, 10, compared=True)  # padded to a round number
    with pytest.raises(KdError, match="the student has a vocabulary of 10 tokens, the data's tokenizer 11"):
        task.agree(narrow, wide, 11, compared=False)
    with pytest.raises(
        KdError, match=r"the student has a vocabulary of 10 tokens, the teacher of 12.*=tokenizer cuts both"
    ):
        task.agree(narrow, wide, 10, compared=True)
    with pytest.raises(KdError, match=r"10 tokens, the teacher of 12.*data\.teacher_tokenizer and loss=\[ce,uld\]"):
        task.agree(narrow, wide, 10, compared=True)


def test_vocabularies_padded_to_other_sizes_agree_once_they_are_restricted() -> None:
    """The way out of the refusal: networks of one tokenizer with rows behind it, each its own number of them."""
    torch.manual_seed(0)
    config = {**LLAMA, "num_hidden_layers": 1, "pad_token_id": None}
    pair = [
        transformers_model(config={**config, "vocab_size": rows}, architecture="causal_lm").eval() for rows in (40, 48)
    ]
    kept, ids = [0, 1, 2, 5, 9, 30, 39], torch.tensor([[1, 5, 9, 39]])
    with torch.no_grad():
        before = [network(input_ids=ids).logits[..., kept] for network in pair]
        for network in pair:
            restrict(network, SimpleNamespace(kept=kept, whole=40))
        after = [network(input_ids=torch.tensor([[1, 3, 4, 6]])).logits for network in pair]
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    CausalLM().agree(*(Output(logits.flatten(0, 1)) for logits in after), 7, compared=True)


def test_labels_of_texts_are_no_tokens() -> None:
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    with pytest.raises(KdError, match=r"^this task predicts tokens, and the data has one target a text: .*data=lm"):
        CausalLM().rows(Batch(inputs, torch.tensor([0, 1]), torch.arange(2)))
