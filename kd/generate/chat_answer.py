"""From what a server sends to a completion: nothing in it is taken on trust. No torch.

The form is that of OpenAI's chat completions, as vLLM, llama.cpp, Ollama, TGI and most vendors answer it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from kd.generate.ledger import BYTES_OF_A_TOKEN, Usage
from kd.records.generations import Candidate, Completion, stored_token

LONGEST = 20_000  # characters of a server's words
SHOWN = 300  # of them in a sentence
MOST_TOKENS = 10**9  # of one request
ENDS = {
    "eos_token": "stop",
    "stop_sequence": "stop",
    "model_length": "length",
}  # TGI's and Mistral's words for OpenAI's


SHORT = 40  # characters of a value in a sentence


class Malformed(ValueError):
    """The answer is not what the protocol promises; a repeated request may succeed. ``usage``: tokens, if it says."""

    usage: Usage | None = None


class OtherForm(Malformed):
    """The answer is whole and no error, and another thing than a completion: a web page, another protocol's object."""


class Declined(ValueError):
    """The server has answered that there is no completion: the same request would give the same. ``usage`` as above."""

    usage: Usage | None = None


def completion(body: bytes, model: str, size: int, logprobs: int, media: str | None = None) -> Completion:
    """Read one completion. ``model``: that was asked for; ``size``: bytes of the prompt; ``logprobs``: number wanted.

    ``media``: the Content-Type of the answer.

    Raises ``Malformed`` for what is no JSON, lacks a field, or has one of another type; ``Declined`` for a refusal.
    """
    usage = None
    try:
        answer = _parsed(body, media)
        usage = _usage(answer.get("usage"))
        choice = _first(answer)
        text = _text(choice)
        found = _logprobs(choice.get("logprobs")) if logprobs else None
    except (Malformed, Declined) as error:
        error.usage = usage
        raise
    reason, named = _reason(choice), answer.get("model")
    if not isinstance(reason, (str, type(None))):
        raise Malformed(f"finish_reason is {_short(reason)}")
    counted = usage or Usage(estimate(size), estimate(len(text.encode())))
    name = named if isinstance(named, str) and named and _is_unicode(named) else model
    return Completion(text, name, reason, counted.tokens_in, counted.tokens_out, usage is None, logprobs=found)


def estimate(size: int) -> int:
    """Estimate the tokens of so many bytes of text."""
    return max(1, -(-size // BYTES_OF_A_TOKEN))


def _parsed(body: bytes, media: str | None) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        of = f" ({_short(media.partition(';')[0])})" if media else ""
        text = _short(body.decode(errors="replace"))
        if text[:1] in ("", "{", "["):
            raise Malformed(f"the answer is not JSON, or was cut off{of}: {text}") from None
        raise OtherForm(f"the answer is not JSON{of}: {text}") from None
    if not isinstance(answer, Mapping):
        raise OtherForm(f"the answer is not an object: {_short(answer)}")
    return answer


def _first(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        if answer.get("error"):
            raise Malformed(f"the answer has no choices: {_short(answer['error'])}")
        raise OtherForm(f"the answer has no choices: {_short(answer)}")
    return choices[0]


def _text(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise OtherForm(f"the choice has no message: {_short(choice)}")
    if _reason(choice) == "content_filter":
        raise Declined("the server's content filter stopped the answer")
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        raise Declined(f"the model refused: {_short(message['refusal'])}")
    text = message.get("content")
    if not text and _reason(choice) == "length":
        raise Declined("max_new_tokens are used up before the answer begins")
    if not isinstance(text, str):
        raise OtherForm(f"the content of the message is {_short(json.dumps(text))}")
    if not text:
        raise Malformed("the content of the message is empty")
    if not _is_unicode(text):
        raise Malformed("the content of the message is not valid Unicode")
    return text


def _reason(choice: Mapping[str, Any]) -> Any:
    """Return why an answer ended: ``stop``, ``length``, another word of the server, or no word at all."""
    reason = choice.get("finish_reason")
    return ENDS.get(reason, reason) if isinstance(reason, str) else reason


def _usage(given: Any) -> Usage | None:
    """Return the tokens as the server counts them; None where it does not, or says what cannot be."""
    if not isinstance(given, Mapping):
        return None
    found = [given.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(type(count) is int and 0 <= count <= MOST_TOKENS for count in found):
        return None
    return Usage(*(int(count) for count in found if count is not None))


def _logprobs(given: Any) -> list[dict[str, Any]] | None:
    """Read the log-probabilities of the tokens; None where the server gives none."""
    if given is None or (isinstance(given, Mapping) and given.get("content") is None):
        return None
    tokens = given.get("content") if isinstance(given, Mapping) else None
    if not isinstance(tokens, list):
        raise Malformed(f"the log-probabilities are no list of tokens: {_short(given)}")
    found = []
    for number, one in enumerate(tokens, 1):
        try:
            found.append(stored_token(_candidate(one), [_candidate(other) for other in one.get("top_logprobs") or []]))
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            why = error if isinstance(error, Malformed) else "it is no {token, logprob, bytes, top_logprobs}"
            raise Malformed(f"the log-probabilities are malformed: token {number}: {_short(why)}") from None
    return found


def _candidate(one: Mapping[str, Any]) -> Candidate:
    token, value, raw = one["token"], one["logprob"], one.get("bytes")
    if not isinstance(token, str) or not _is_unicode(token):
        raise Malformed(f"token = {str(token)[:SHORT]!r} must be a text")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value > 1e-3:
        raise Malformed(f"logprob = {str(value)[:SHORT]} of {token[:SHORT]!r} must be a number, at most 0")
    return token, float(value), bytes(raw) if isinstance(raw, list) and raw else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def words_of(body: bytes) -> tuple[str, str]:
    """Return an error's code and message as far as a body tells them."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return "", _short(text)
    error = said.get("error", said) if isinstance(said, Mapping) else said
    if isinstance(error, Mapping):
        message = error.get("message") or error.get("detail") or error.get("msg") or error
        return str(error.get("code") or error.get("type") or ""), _short(message)
    return "", _short(error)


def _short(value: Any) -> str:
    """Shorten to one line, without control characters: a terminal would obey them."""
    text = str(value)[:LONGEST]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shown(text: str, key: str | None) -> str:
    """Return a server's words as they are printed and written: 300 characters, without the key.

    The key is taken out before the words are cut: a part of it would be left otherwise.
    """
    text = text.replace(key, "[key]") if key else text
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
