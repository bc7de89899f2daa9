"""Embeddings of sentences: no classes, and no labels."""

from __future__ import annotations

import pytest

from kd.errors import KdError
from kd.losses.logits.ce import CrossEntropy
from kd.losses.logits.kd import KnowledgeDistillation
from kd.losses.logits.mse import SquaredError
from kd.losses.relations.rkd import Relational
from kd.tasks.embedding import Embedding


@pytest.mark.parametrize("term", [KnowledgeDistillation(), CrossEntropy(), SquaredError()])
def test_what_reads_classes_or_labels_is_refused(term) -> None:
    with pytest.raises(KdError, match=r"^loss\.it is for classes, and task = embedding has none: .*against=teacher"):
        Embedding().check_terms([("it", term)])


@pytest.mark.parametrize("term", [SquaredError("teacher"), Relational()])
def test_what_compares_embeddings_is_taken(term) -> None:
    Embedding().check_terms([("it", term)])
