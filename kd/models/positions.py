"""What is asked of a network of transformers without an import of that library."""

from __future__ import annotations

from typing import Any

from torch import nn


def positions_of(network: nn.Module) -> int | None:
    """Return how many positions a row may have for a network of transformers; None where no limit is known.

    Its configuration says it. Of a table that begins with a row for padding (RoBERTa's) the rows behind that one count;
    where positions are relative alone (XLNet, DeBERTa without ``position_biased_input``) there is no limit.
    """
    for part in network.modules():
        config: Any = getattr(part, "config", None)
        most = getattr(config, "max_position_embeddings", None)
        if isinstance(most, int) and most > 0:
            break
    else:
        return None
    if getattr(config, "position_biased_input", True) is False:
        return None
    tables = (m for name, m in network.named_modules() if name.endswith("position_embeddings"))
    padding = next((m.padding_idx for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None), -1)
    return most - padding - 1
