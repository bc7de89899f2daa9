"""A frozen encoder of ``transformers`` that makes one vector of each text, on the CPU, once for all runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.config.hub import online, reason
from kd.data.text.collate import padded
from kd.data.text.encode import encode_texts
from kd.data.text.store import Features
from kd.data.text.tokenizer import most_tokens
from kd.errors import KdError
from kd.losses.layouts import mean_of_positions

log = logging.getLogger(__name__)

FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a folder: weights, configuration and tokenizer, no code
CHUNK = 1 << 22  # bytes that are read at once


class Encoder:
    """A network with its tokenizer, found by ``name``: a folder, below ``root`` as well, or a name of the hub.

    ``pooling``: ``mean`` of the last hidden states over the positions of the mask, or that of the first (``cls``).
    Finding and digesting it imports no ``transformers``: only texts that are not in the cache need the network.
    Raises ``KdError`` when there is no such folder, or what is in it is no encoder with its weights.
    """

    def __init__(self, name: str, root: str | None, pooling: str) -> None:
        self.name, self.pooling = name, pooling
        self.folder = _folder(name, root)
        self.files = sorted({file for pattern in FILES for file in self.folder.glob(pattern)})
        if not any(file.suffix == ".safetensors" for file in self.files):
            raise KdError(f"data.encoder = {name}: {self.folder} has no weights in the format safetensors")

    def digest(self) -> str:
        """Return 16 hexadecimal digits of all files of the encoder."""
        found = hashlib.blake2b(digest_size=8)
        for file in self.files:
            found.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as opened:
                while part := opened.read(CHUNK):
                    found.update(part)
        return found.hexdigest()

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int | None, batch: int) -> Features:
        """Encode texts, or pairs of them, to (texts, width) float32; ``batch`` of about one length at a time.

        ``max_length``: tokens of a text, with the special ones; longer ones are truncated.
        """
        network, tokenizer = self._load()
        own = most_tokens(tokenizer)
        if max_length is not None and own is not None and max_length > own:
            raise KdError(f"data.max_length = {max_length} is not allowed: data.encoder takes {own} tokens at most")
        tokens = encode_texts(tokenizer, texts, pairs, max_length or own)
        if tokens.truncated:
            log.warning("%s of %s texts are truncated to %s tokens", tokens.truncated, len(texts), max_length or own)
        begin, lengths = tokens.offsets[:-1], np.diff(tokens.offsets)
        log.info("encoding %s texts with %s, once for all runs", f"{len(texts):,}", self.name)
        values: np.ndarray | None = None
        for rows in np.array_split(np.argsort(-lengths, kind="stable"), -(-len(texts) // batch)):
            width = int(lengths[rows].max())
            real = torch.from_numpy((np.arange(width) < lengths[rows, None]).astype(np.int64))
            inputs = {"input_ids": padded(tokens.ids, begin[rows], lengths[rows], width, tokenizer.pad_token_id or 0)}
            if tokens.types is not None:
                inputs["token_type_ids"] = padded(tokens.types, begin[rows], lengths[rows], width, 0)
            ids = {name: torch.from_numpy(array.astype(np.int64)) for name, array in inputs.items()}
            with torch.inference_mode():
                found = self._pooled(network(**ids, attention_mask=real).last_hidden_state, real).numpy()
            values = np.empty((len(texts), found.shape[1]), dtype=np.float32) if values is None else values
            values[rows] = found
        assert values is not None
        return Features(values)

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden[:, 0] if self.pooling == "cls" else mean_of_positions(hidden, mask)

    def _load(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        place = str(self.folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
            network, about = AutoModel.from_pretrained(
                place,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # of many kinds: no model, a file that is damaged, a library that it needs
            raise KdError(f"data.encoder = {self.name} cannot be loaded: {reason(error)}") from None
        lacking = sorted(key for key in about["missing_keys"] if not key.startswith("pooler."))
        if lacking:
            raise KdError(f"data.encoder = {self.name} has no weights for {lacking[0]}: it would be random")
        if network.config.is_encoder_decoder:
            raise KdError(f"data.encoder = {self.name} is not allowed: it must be an encoder, without a decoder")
        return network.eval(), tokenizer


def _folder(name: str, root: str | None) -> Path:
    """Return the folder of an encoder; one of the hub is fetched unless it is in the cache."""
    folder = next((p for p in (Path(name).expanduser(), Path(root or ".") / name) if p.is_dir()), None)
    if folder is not None:
        return folder
    if name.startswith((".", "/", "~")):
        raise KdError(f"data.encoder = {name}: there is no such folder")
    from huggingface_hub import snapshot_download

    why = ""
    for local in _local_first():
        try:
            return Path(snapshot_download(name, local_files_only=local, allow_patterns=list(FILES)))
        except Exception as error:  # of many kinds: no such name, no connection
            why = reason(error)
    raise KdError(
        f"data.encoder = {name} cannot be loaded: it must be a folder (relative to paths.data, or here), or a name of "
        f"the Hugging Face hub that can be reached or is in its cache ({why})"
    )


def _local_first() -> Iterator[bool]:
    """Give whether the cache alone is read, first: what is there needs no connection."""
    yield True
    if online():
        yield False
