"""Values whose type the source of a target tells are refused before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kd.config.argument_types import complaint


@pytest.mark.parametrize(
    ("value", "annotation", "words"),
    [
        (3, "float | None", ""),
        (None, "float | None", ""),
        ("abc", "float | None", "it must be a number or null"),
        (True, "int", "it must be a whole number"),
        (1.5, "int", "it must be a whole number"),
        (1, "bool", "it must be true or false"),
        (7, "str", "it must be a text"),
        ("abc", "Optional[int]", "it must be a whole number or null"),
        ("abc", "Union[int, float, None]", "it must be a whole number, a number or null"),
        ([1, 2], "Sequence[int]", ""),
        ("abc", "Sequence[int]", "it must be a list of whole numbers"),
        ([1, "a"], "list[int] | None", "it must be a list of whole numbers or null"),
        ([-1, "layer"], "Sequence[str | int] | None", ""),
        ("abc", "float | Tensor", ""),  # somebody else's type: it may take a word
        ("abc", "Literal['abc']", ""),
        ({"a": 1}, "Mapping[str, Any]", ""),
        ("abc", "not python (", ""),
        ("abc", "", ""),
    ],
)
def test_what_an_annotation_says(value: Any, annotation: str, words: str) -> None:
    assert complaint(value, annotation) == words


def test_a_word_in_the_place_of_a_number_stops_a_run_without_torch(tmp_path: Path) -> None:
    wrong = ["data.val_fraction=abc", "loss.ce.label_smoothing=no", "student.model.hidden=3"]
    code = (
        "import sys; from kd.cli.main import main; "
        f"code = main(['train', 'hydra.run.dir={tmp_path / 'run'}', *{wrong}]); "
        "sys.exit(code + 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    for key in ("data.val_fraction = abc", "loss.ce.label_smoothing = no", "student.model.hidden = 3"):
        assert key in done.stderr
    assert not (tmp_path / "run").exists()
