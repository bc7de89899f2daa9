"""Networks of transformers restricted to some of the tokens that they know, without a change of what is left."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kd.losses.networks import in_eval

log = logging.getLogger(__name__)

SOME = 4  # tokens that answers are compared on
CLOSE = 1e-4  # how far answers may be from those of before, relative to the largest


class Restriction(Protocol):
    """The entries of a tokenizer that are kept: the old id (n,) of each new one; how many there were."""

    kept: Any
    whole: int


def restrict(network: Any, restriction: Restriction) -> None:
    """Cut a network of transformers, in place, to the tokens that are kept.

    Its input embeddings and output projection, with its bias, tied or not, keep the rows (n) of these tokens; special
    tokens of its configuration get their new ids. Its logits are those of before at the kept ids, so that its
    probabilities are renormalised over them. A network that has the kept tokens alone already is left as it is. What is
    cut of one that knows more than the tokenizer is said in the log: rows that its makers padded it with.

    Raises ``ValueError`` for a network of another vocabulary, or whose answers would change.
    """
    kept = torch.as_tensor(restriction.kept)
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
    rows = table.weight.shape[0]
    if rows == len(kept):
        return
    if rows < restriction.whole:
        raise ValueError(
            f"it has {rows} tokens, data.tokenizer {restriction.whole}, of which data.vocabulary keeps {len(kept)}: "
            "they do not belong together, give the tokenizer that the network was trained with"
        )
    if not isinstance(table, nn.Embedding) or not isinstance(head, (nn.Linear, type(None))):
        raise ValueError("its embeddings are wrapped (lora), so that data.vocabulary cannot cut them")
    if rows > restriction.whole:
        log.info(
            "a %s has %s rows of vocabulary, data.tokenizer %s tokens: the rows behind them are cut off",
            *(type(network).__name__, f"{rows:,}", f"{restriction.whole:,}"),
        )
    few = torch.linspace(0, len(kept) - 1, SOME).long()
    before = _answer(network, kept[few])
    with torch.no_grad():  # the kept rows come first: transformers cuts those behind, and ties what was tied
        tensors = {id(t): t for part in (table, head) if part is not None for t in part.parameters(recurse=False)}
        for tensor in tensors.values():
            tensor[: len(kept)] = tensor[kept.to(tensor.device)]
    for part in (m for m in network.modules() if head is not None and head in m.children()):
        bias = getattr(part, "bias", None)  # a second one, which networks with untied weights do not use: RoBERTa's
        if isinstance(bias, nn.Parameter) and bias is not getattr(head, "bias", None) and len(bias) == rows:
            part.bias = nn.Parameter(bias.detach()[kept.to(bias.device)], bias.requires_grad)
    network.resize_token_embeddings(len(kept), mean_resizing=False)
    _renumber(network, table.padding_idx, {old: number for number, old in enumerate(kept.tolist())})
    after = _answer(network, few)
    before = before[..., kept] if before.shape[-1] == rows else before
    if after.shape != before.shape or (after - before).abs().max() > CLOSE * before.abs().max():
        raise ValueError(f"a {type(network).__name__} cannot be restricted to some of its tokens: its answers change")


def _answer(network: Any, ids: Tensor) -> Tensor:
    """Return logits, or the hidden states of a network without, of one row of tokens."""
    with in_eval(network), torch.no_grad():
        made = network(input_ids=ids.unsqueeze(0).to(next(network.parameters()).device))
    return (made["logits"] if "logits" in made else made[0]).float()


def _renumber(network: Any, pad: int | None, new: Mapping[int, int]) -> None:
    """Give the special tokens of a network's configurations their ``new`` ids, and its embeddings that of the pad."""
    if pad is not None:
        network.get_input_embeddings().padding_idx = new.get(pad)
    for config in (network.config, getattr(network, "generation_config", None)):
        for key, value in list(vars(config).items()) if config is not None else ():
            if key.endswith("_token_id"):
                setattr(config, key, _renumbered(value, new))


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    """Return the new id of a special token, or of several; None of one that is not kept."""
    if isinstance(value, list):
        return [new[old] for old in value if old in new]
    return new.get(value)
