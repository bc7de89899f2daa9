"""Folders of transformers that bring code of their own, which says where it has run."""

from __future__ import annotations

import json
from pathlib import Path

CODE = """from transformers import PreTrainedConfig, PreTrainedTokenizerFast

raise SystemExit("code of a stranger has run")


class Tokens(PreTrainedTokenizerFast):
    pass


class Config(PreTrainedConfig):
    pass
"""


def with_code(folder: Path, config: bool = False) -> Path:
    """Let a folder's tokenizer be a class of the folder; ``config``: its configuration instead."""
    (folder / "stranger.py").write_text(CODE)
    file = folder / ("config.json" if config else "tokenizer_config.json")
    found = json.loads(file.read_text()) if file.is_file() else {}
    named = {"AutoConfig": "stranger.Config"} if config else {"AutoTokenizer": ["stranger.Tokens", None]}
    found |= {"auto_map": named, "model_type" if config else "tokenizer_class": "Stranger"}
    file.write_text(json.dumps(found))
    return folder
