"""Tokenizers: those of Hugging Face ``transformers``, and one that is trained on the training texts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.config.hub import reason
from kd.data.text.content import digest_of
from kd.data.text.records import online
from kd.errors import KdError
from kd.records.durable import mark, replacing

log = logging.getLogger(__name__)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 4000
UNLIMITED = 10**9  # transformers' maximum of a tokenizer that has none is larger


def tokenizer(
    spec: Any,
    kind: str,
    texts: Callable[[], Sequence[str]],
    cache: Path | None,
    root: str | None,
    key: str = "tokenizer",
) -> tuple[Any, str]:
    """Return a tokenizer of ``transformers`` and its digest.

    ``spec``: a name, a folder, also of a run, an object of ``transformers``, or the settings of one that is trained on
    ``texts()``: ``vocabulary`` (entries, at most), ``kind`` (``wordpiece``, or byte-level ``bpe``; where not set:
    ``kind``), ``lowercase`` (where not set: of ``wordpiece`` only). None: trained, with 4,000 entries. One that is
    trained where ``kind`` is ``bpe``, for documents, gives no token types: ``generate`` of a decoder takes none.
    ``KdError`` when there is none of that name, or it needs another library; ``key``: the option of the data that names
    it.
    """
    if isinstance(spec, (str, Path)):
        found = _named(str(spec), root, key)
    elif spec is None or isinstance(spec, Mapping):
        given = dict(spec or {})
        chosen = given.get("kind") or kind
        lower = given.get("lowercase")
        settings = {"vocabulary": given.get("vocabulary", VOCABULARY), "kind": chosen}
        made = trained(texts(), cache=cache, lowercase=chosen == "wordpiece" if lower is None else lower, **settings)
        found = wrapped(made, types=kind == "wordpiece")
    else:
        found = spec
    if found.pad_token_id is None:
        _pad_with_another(found, key)
    return found, digest(found)


def _named(name: str, root: str | None, key: str) -> Any:
    from transformers import AutoTokenizer

    folder = next((p for p in (Path(name).expanduser(), Path(root or ".") / name) if p.is_dir()), None)
    if folder is not None and (folder / "selected" / "tokenizer_config.json").is_file():  # of a run
        folder = folder / "selected"
    if folder is None and name.startswith((".", "/", "~")):
        raise KdError(f"data.{key} = {name}: there is no such folder")
    error = Exception()
    packed = _packed_in(folder)
    for local in (True, False) if folder is None and online() else (True,):  # what is in the cache needs no connection
        try:
            return AutoTokenizer.from_pretrained(
                str(folder or name), local_files_only=local, trust_remote_code=False, **packed
            )
        except Exception as failed:  # of many kinds: no such name, no connection, a library that it needs
            error = failed
    raise KdError(
        f"data.{key} = {name} cannot be loaded: it must be a folder with a tokenizer, or a name of the Hugging "
        f"Face hub that can be reached or is in its cache ({reason(error)})"
    ) from None


def _packed_in(folder: Path | None) -> dict[str, str]:
    """Name the GGUF file of a folder that has no other file with a tokenizer."""
    files = [] if folder is None else sorted(file.name for file in folder.iterdir())
    packed = [name for name in files if name.endswith(".gguf")]
    alone = len(packed) == 1 and not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in files)
    return {"gguf_file": packed[0]} if alone else {}


def _pad_with_another(found: Any, key: str) -> None:
    """Pad with a token that the tokenizer has.

    Pads are known by the attention mask, but to decoders that classify: these know them by the id in their
    configuration, see :func:`kd.models.transformers_model.pad_as`.
    """
    token = found.eos_token or found.unk_token
    if token is None:
        raise KdError(f"data.{key} has neither a pad nor an end token: set one of them in its files")
    found.pad_token = token


def digest(found: Any) -> str:
    """Return 16 hexadecimal digits of all that decides which ids a text becomes."""
    backend = getattr(found, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else json.dumps(found.get_vocab(), sort_keys=True)
    if backend is not None:  # how a text is cut and padded is said in each call
        parts = json.loads(whole)
        whole = json.dumps({k: v for k, v in parts.items() if k not in ("truncation", "padding")}, sort_keys=True)
    special = json.dumps({k: str(v) for k, v in found.special_tokens_map.items()}, sort_keys=True)
    return hashlib.blake2b(f"{whole}{special}".encode(), digest_size=8).hexdigest()


def encoding_digest(found: Any, known: str) -> str:
    """Return 16 hexadecimal digits of all that decides which rows texts become: the side that is cut, token types.

    ``known``: its :func:`digest`, which takes tenths of a second to make.
    """
    how = [known, getattr(found, "truncation_side", "right"), *getattr(found, "model_input_names", [])]
    return hashlib.blake2b(" ".join(how).encode(), digest_size=8).hexdigest()


def most_tokens(found: Any) -> int | None:
    """Return the longest input that a tokenizer's network takes, None where it does not say."""
    most = getattr(found, "model_max_length", None)
    return int(most) if most is not None and most < UNLIMITED else None


# ---------------------------------------------------------------------- trained here


def trained(texts: Sequence[str], vocabulary: int, kind: str, lowercase: bool, cache: Path | None = None) -> Any:
    """Train a ``tokenizers.Tokenizer``, the same from the same texts on every machine; kept in the folder ``cache``."""
    key = digest_of(texts, "tokenizer 1", vocabulary, kind, lowercase)
    file = None if cache is None else cache / f"tokenizer-{key}.json"
    if (kept := _kept(file, key)) is not None:
        return kept
    made = (_bpe if kind == "bpe" else _wordpiece)(texts, vocabulary, lowercase)
    log.info("trained a %s tokenizer of %s entries on %s texts", kind, f"{made.get_vocab_size():,}", f"{len(texts):,}")
    if file is not None:
        _keep(file, key, made.to_str())
    return made


def wrapped(trained_one: Any, types: bool = True) -> Any:
    """Give a trained tokenizer the form of ``transformers``, with its special tokens.

    ``types``: it gives token types as well, the number of a pair's text that a token is of.
    """
    from transformers import PreTrainedTokenizerFast

    pad, unknown, begin, end, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=trained_one,
        pad_token=pad,
        unk_token=unknown,
        cls_token=begin,
        sep_token=end,
        eos_token=end,
        mask_token=mask,
        model_input_names=["input_ids", *(["token_type_ids"] if types else []), "attention_mask"],
    )


def _wordpiece(texts: Sequence[str], vocabulary: int, lowercase: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    letters = sorted(set(normalizer.normalize_str("".join(sorted(set().union(*map(set, texts)))))) - {" "})
    _check(vocabulary, len(SPECIAL) + 2 * len(letters), f"there are {len(letters)} characters")

    def bare(model: Any) -> Any:
        made = Tokenizer(model)
        made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
        return made

    # the trainer numbers inner letters in the order of a hash map, another one in each process, and breaks ties by
    # these numbers: named beforehand, they have fixed ones
    inner = [f"##{letter}" for letter in letters]
    draft = bare(models.WordPiece(unk_token=SPECIAL[1]))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=[*SPECIAL, *inner], initial_alphabet=letters, show_progress=False
    )
    draft.train_from_iterator(texts, trainer)
    made = bare(models.WordPiece(json.loads(draft.to_str())["model"]["vocab"], unk_token=SPECIAL[1]))
    made.decoder = decoders.WordPiece()
    return _finished(made)


def _bpe(texts: Sequence[str], vocabulary: int, lowercase: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check(vocabulary, len(SPECIAL) + len(alphabet), "there are 256 bytes")
    made = Tokenizer(models.BPE())
    if lowercase:
        made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return _finished(made)


def _check(vocabulary: int, least: int, why: str) -> None:
    if vocabulary < least:
        raise KdError(f"data.tokenizer.vocabulary = {vocabulary} is not allowed: it must be {least} or more, {why}")


def _finished(made: Any) -> Any:
    """Begin a text with [CLS] and end it, and each of a pair, with [SEP]."""
    from tokenizers import processors

    made.add_special_tokens(list(SPECIAL))
    _, _, begin, end, _ = SPECIAL
    made.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(token, made.token_to_id(token)) for token in (begin, end)],
    )
    return made


def _kept(file: Path | None, key: str) -> Any:
    """Return the tokenizer of an earlier run; None where there is none, or the file is not whole."""
    from tokenizers import Tokenizer

    try:
        kept = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None
        if kept is None or kept["key"] != key or digest_of([kept["tokenizer"]]) != kept["digest"]:
            return None
        return Tokenizer.from_str(kept["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(file: Path, key: str, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, f".{mark()}") as temporary:
            temporary.write_text(json.dumps({"key": key, "digest": digest_of([text]), "tokenizer": text}))
    except (OSError, KdError) as error:
        log.warning("the tokenizer is trained anew in each run: %s", error)
