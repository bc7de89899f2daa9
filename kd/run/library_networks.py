"""Networks of transformers of a run: a student cut from its teacher, a vocabulary restricted to the data's.

transformers is imported where a run has such a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kd.distill.answers import Answers
from kd.errors import KdError


def cut_from(teacher: Answers | None, surgery: Mapping[str, Any]) -> nn.Module:
    """Make the student that ``student.surgery`` describes. ``KdError`` where there is no one live teacher to cut."""
    if teacher is None or len(teacher.networks) != 1:
        raise KdError(
            "student.surgery makes the student from one live teacher: give teacher.checkpoint=RUN or model@teacher=NAME"
        )
    from kd.models import transformers_model  # start-up: transformers
    from kd.models.surgery import Surgery, student_of  # start-up: with it

    whole = teacher.networks[0]
    given = transformers_model.library_network(whole)
    if given is None:
        raise KdError(f"student.surgery cuts networks of transformers: the teacher is a {type(whole).__name__}")
    try:
        made = student_of(given, Surgery(**{k: v for k, v in surgery.items() if v is not None}))
    except ValueError as error:
        raise KdError(f"student.surgery: {error}") from error
    pooling: Any = getattr(whole, "pooling", None)
    return made if pooling is None else transformers_model.SentenceEncoder(made, pooling)


def restrict(network: nn.Module, restriction: Any, tokenizer: Any, source: str) -> None:
    """Cut a network to the entries that the data keeps of its tokenizer; one of another library is left as it is.

    ``tokenizer``: the restricted one, whose pad decoders that classify must know. ``KdError`` names the ``source`` of a
    network that cannot be cut.
    """
    from kd.models import vocabulary  # start-up: transformers
    from kd.models.transformers_model import library_network, pad_as  # start-up: with it

    inner = library_network(network)
    if inner is None:
        return
    try:
        vocabulary.restrict(inner, restriction)
        pad_as(inner, tokenizer)
    except ValueError as error:
        raise KdError(f"{source}: {error}") from error
