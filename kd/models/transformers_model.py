"""Any encoder or decoder of Hugging Face's transformers: by name, by folder, or made from a configuration.

transformers is the extra ``text``, and imported where this module is used.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kd.config.hub import online, reason
from kd.losses.layouts import mean_of_positions
from kd.losses.networks import unwrapped
from kd.models.base import stages

log = logging.getLogger(__name__)

AUTO = {  # architecture → transformers' factory
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "sequence_regression": transformers.AutoModelForSequenceClassification,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "causal_lm": transformers.AutoModelForCausalLM,
    "question_answering": transformers.AutoModelForQuestionAnswering,
    "embedding": transformers.AutoModel,
}
POOLING = ("mean", "cls")
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
# of a configuration: where it came from, and what would run code of others
DROPPED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
CODE = ("auto_map", "trust_remote_code", "custom_pipelines")  # of a configuration: they name code of others
LORA = (  # arguments of peft.LoraConfig that a weights file describes, and so those that are allowed
    *("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "use_dora", "fan_in_fan_out"),
    *("exclude_modules", "task_type"),
)


def transformers_model(
    name: str | None = None,
    pretrained: bool = True,
    config: Mapping[str, Any] | None = None,
    *,
    architecture: str | None = None,
    num_classes: int | None = None,
    tokenizer: Any = None,
    pooling: str = "mean",
    lora: Mapping[str, Any] | None = None,
    typed: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Build a network of transformers with the head that a task wants.

    ``name``: of a model on the hub, or a folder with ``config.json``; ``pretrained``: with its weights, else random.
    ``config``: without a name ``{model_type: bert, num_hidden_layers: 2, …}``; beside one, keys that replace its own.
    ``architecture``: a key of ``AUTO``, given by the task. ``num_classes``: outputs of a classifier. ``tokenizer``: of
    the data; a network without a name takes its vocabulary, one with a name must have room for it. ``pooling``: of a
    sentence embedding, ``mean`` or ``cls``. ``lora``: arguments of ``peft.LoraConfig``; all else is frozen then.
    ``typed``: a person wrote ``config``, and keys that look mistyped are refused; a weights file may keep any.
    ``kwargs``: of ``from_pretrained``.

    Raises ``ValueError`` with one sentence when there is no such model, or its weights cannot be had.
    """
    if architecture not in AUTO:
        raise ValueError(
            f"architecture = {architecture} is not allowed: it must be {', '.join(AUTO)} (of the task: set task)"
        )
    if pooling not in POOLING:
        raise ValueError(f"pooling = {pooling} is not allowed: it must be mean or cls")
    if name is None and "model_type" not in (config or {}):
        raise ValueError("it has neither a name (name=MODEL or FOLDER) nor a config={model_type: …}")
    refuse_code(kwargs)
    made = _configuration(name, config or {}, tokenizer, kwargs, typed)
    if architecture == "sequence_classification" and num_classes is not None:
        made.num_labels = num_classes
    if architecture == "sequence_regression":
        made.num_labels, made.problem_type = 1, "regression"
    factory = AUTO[architecture]
    kwargs.setdefault("dtype", torch.float32)  # else it is trained in that of the file, whatever the precision says
    if name is not None and pretrained:
        fetch = functools.partial(factory.from_pretrained, name, config=made, trust_remote_code=False)
        network, found = _fetched(name, functools.partial(fetch, output_loading_info=True, **kwargs))
        fresh = sorted(found["missing_keys"])
        if fresh:
            log.warning("%s has no weights for %s: they are random", name, ", ".join(fresh[:4]))
        network.random_weights = fresh
    else:
        asked = {key: kwargs[key] for key in ("dtype", "attn_implementation") if key in kwargs}
        if other := sorted(kwargs.keys() - asked.keys()):
            raise ValueError(
                f"{other[0]} = {kwargs[other[0]]} is of from_pretrained: with pretrained=false it does nothing"
            )
        network = factory.from_config(made, trust_remote_code=False, **asked)
    refuse_small_vocabulary(network, tokenizer, name)
    pad_as(network, tokenizer)
    if lora is not None:
        network = with_lora(network, lora)
    network.train()
    return SentenceEncoder(network, pooling) if architecture == "embedding" else network


def _configuration(
    name: str | None, changes: Mapping[str, Any], tokenizer: Any, kwargs: Mapping[str, Any], typed: bool
) -> Any:
    own = {key: _plain(value) for key, value in changes.items() if key not in (*DROPPED, *CODE, "model_type")}
    if name is not None:
        where = {key: kwargs[key] for key in ("gguf_file", "revision", "subfolder", "cache_dir") if key in kwargs}
        fetch = functools.partial(transformers.AutoConfig.from_pretrained, name, trust_remote_code=False)
        own_kind = name if name in transformers.CONFIG_MAPPING else "bert"
        return _fetched(name, functools.partial(fetch, **own, **where), own_kind)
    if tokenizer is not None:
        ids = {key: getattr(tokenizer, key, None) for key in SPECIAL}
        ids["bos_token_id"] = ids["eos_token_id"] if ids["bos_token_id"] is None else ids["bos_token_id"]
        own = {"vocab_size": len(tokenizer), **{k: v for k, v in ids.items() if v is not None}, **own}
    try:
        made = transformers.AutoConfig.for_model(changes["model_type"], **own)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config.model_type = {changes['model_type']}: {str(error).splitlines()[0]}") from error
    if typed:
        _refuse_mistyped(made, own)
    return made


def _refuse_mistyped(made: Any, own: Mapping[str, Any]) -> None:
    """``ValueError`` for a key that looks like one of the configuration's and is none: transformers keeps any."""
    try:
        known = type(made)()
    except (TypeError, ValueError):  # one of several networks has no defaults
        return
    for key in own:
        if key.endswith("_token_id") or hasattr(known, key):
            continue
        if near := get_close_matches(key, known.to_dict(), cutoff=0.8):
            raise ValueError(f"config.{key} is no key of {made.model_type} (near: {', '.join(near)})")


def _fetched(name: str, fetch: Any, kind: str | None = None) -> Any:
    """Fetch a configuration or a network. ``kind``: a model_type, where a network of an own size needs no name."""
    here = Path(name).is_dir()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    try:
        if here:  # a bar of a second, once a run and once a job
            transformers.utils.logging.disable_progress_bar()
        return fetch(**({} if here or online() else {"local_files_only": True}))
    except (OSError, ValueError, ImportError) as error:
        own = f"; for one of your own size leave name out: config={{model_type: {kind}, …}}" if kind else ""
        raise ValueError(
            f"name = {name} cannot be had of transformers ({reason(error)}): give the folder of a network that is "
            f"here, or be online{own}"
        ) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def refuse_code(kwargs: Mapping[str, Any]) -> None:
    """``ValueError`` for arguments that would run code of others: from a model's folder, or out of a pickle."""
    for key in CODE:
        if kwargs.get(key) not in (None, False):
            raise ValueError(f"{key} = {kwargs[key]} is not allowed: code that comes with weights is not run")
    if kwargs.get("weights_only", True) is not True:
        raise ValueError("weights_only = false is not allowed: a pickle is read as data, or not at all")


def refuse_small_vocabulary(network: nn.Module, tokenizer: Any, name: str | None) -> None:
    """``ValueError`` when the data's tokenizer has ids that the network has no embedding for."""
    if tokenizer is None:
        return
    rows = network.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise ValueError(
            f"{name or 'the network'} has {rows} tokens, data.tokenizer {len(tokenizer)}: they do not belong together, "
            "give the tokenizer that the network was trained with"
        )


def pad_as(network: Any, tokenizer: Any) -> None:
    """Set the pad of a decoder that classifies, in its configuration, to the tokenizer's: it answers before the pads.

    Encoders find pads by the attention mask; some count their positions by a pad of their own, which stays.
    """
    pad, classifies = getattr(tokenizer, "pad_token_id", None), _names(AUTO["sequence_classification"])
    encoder = type(network.config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if pad is not None and not encoder and type(network).__name__ in classifies:
        network.config.pad_token_id = network.config.get_text_config().pad_token_id = pad


def with_lora(network: nn.Module, lora: Mapping[str, Any]) -> nn.Module:
    """Freeze a network and add low-rank matrices to it (Hu 2021, arXiv 2106.09685), by peft."""
    try:
        import peft
    except ImportError:
        raise ValueError("lora needs peft: pip install peft") from None
    if other := [key for key in lora if key not in LORA]:
        raise ValueError(f"lora.{other[0]} is not allowed: it must be one of {', '.join(LORA)}")
    try:
        return peft.get_peft_model(network, peft.LoraConfig(**_plain(lora)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"lora: {str(error).splitlines()[0]}") from error


class SentenceEncoder(nn.Module):
    """A network of transformers that answers a sentence with its embedding (rows, width); tap it as ``pooled``.

    Its stages are those of the encoder.

    ``pooling``: ``mean`` of the hidden states over the positions that are not padding, or that of the first (``cls``).
    """

    def __init__(self, encoder: nn.Module, pooling: str) -> None:
        super().__init__()
        self.encoder, self.pooling, self.pooled = encoder, pooling, nn.Identity()
        try:
            self.stages = tuple(f"encoder.{stage.name}" for stage in stages(encoder))
        except ValueError:
            self.stages = ()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Return the embeddings (rows, width)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        return self.pooled(hidden[:, 0] if self.pooling == "cls" else mean_of_positions(hidden, attention_mask))


# ---------------------------------------------------------------------- what is kept of a network


def library_network(network: nn.Module) -> Any:
    """Return the network of transformers inside of what the run trains; None where it is none."""
    inner = unwrapped(network.encoder if isinstance(network, SentenceEncoder) else network)
    if not any(kind.__module__.startswith("transformers.") for kind in type(inner).__mro__):
        return None  # without an import of the library's base class, which takes seconds
    return inner if isinstance(inner, transformers.PreTrainedModel) else None


def description(network: nn.Module) -> dict[str, Any] | None:
    """Return a node that makes the same network with random weights, from nothing but itself; None of another network.

    It is written into weights files, so that they need neither the folder nor the teacher that it was made from.
    """
    inner = library_network(network)
    if inner is None:
        return None
    architecture = next((key for key, auto in AUTO.items() if type(inner).__name__ in _names(auto)), None)
    if architecture is None:
        return None
    config = {k: v for k, v in inner.config.to_diff_dict().items() if k not in (*DROPPED, *CODE)}
    node: dict[str, Any] = {
        "_target_": f"{__name__}.transformers_model",
        "config": config,
        "architecture": architecture,
    }
    node |= {"name": None, "pretrained": False}
    node |= {"pooling": network.pooling} if isinstance(network, SentenceEncoder) else {}
    wrapped: Any = network.encoder if isinstance(network, SentenceEncoder) else network
    if hasattr(wrapped, "peft_config"):
        adapter = next(iter(wrapped.peft_config.values())).to_dict()
        node["lora"] = {key: _plain(adapter[key]) for key in LORA if adapter.get(key) not in (None, {}, [])}
    return node


def _names(auto: Any) -> set[str]:
    """Return the names of the classes that a factory makes; none of them is imported for it."""
    listed = auto._model_mapping._model_mapping.values()
    return {name for made in listed for name in (made if isinstance(made, (tuple, list)) else (made,))}


def _plain(value: Any) -> Any:
    """Return a value of a configuration as plain Python containers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [_plain(part) for part in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def merged(network: nn.Module) -> Any:
    """Copy the network of transformers with its low-rank matrices added to its weights, as it is deployed."""
    wrapped: Any = network.encoder if isinstance(network, SentenceEncoder) else network
    return copy.deepcopy(wrapped).merge_and_unload() if hasattr(wrapped, "peft_config") else wrapped
