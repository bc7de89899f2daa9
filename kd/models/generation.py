"""How a language model of transformers draws tokens, whatever its own ``generation_config`` says."""

from __future__ import annotations

from typing import Any


def generation_config(
    max_new_tokens: int, temperature: float | None, top_p: float | None, ends: int | list[int] | None, pad: int | None
) -> Any:
    """Return a ``GenerationConfig`` with every setting that changes what is drawn.

    ``temperature``: 0 takes the likeliest token, None is 1; ``top_p``: None is 1. ``ends``: ids that end a text. A
    network's own configuration still fills in what this one leaves out: replace it by an empty one while it generates.
    """
    from transformers import GenerationConfig  # start-up: set-ups import this module

    sampled = temperature != 0
    drawn: dict[str, Any] = {"do_sample": sampled}
    if sampled:
        drawn |= {"temperature": 1.0 if temperature is None else temperature}
        drawn |= {"top_k": 0, "top_p": 1.0 if top_p is None else top_p}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=pad,
        **drawn,
    )
