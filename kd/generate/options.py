"""The arguments of ``kd generate``, and which of them decide what a teacher writes. No torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kd.config.rules import FLAG, Rule, number, one_of, refusals, refuse, whole
from kd.errors import did_you_mean
from kd.generate.server_address import endpoint

TEXT = Rule("a text", lambda value: isinstance(value, str) and bool(value))
RATE = number(above=0).or_null
RULES = {
    **dict.fromkeys(("prompts", "out", "model", "currency"), TEXT),
    **dict.fromkeys(("server", "references", "system", "key_env"), TEXT.or_null),
    "form": one_of("text", "messages", None),
    "max_new_tokens": whole(1),
    "temperature": number(least=0).or_null,
    "top_p": number(above=0, most=1).or_null,
    "seed": whole(0).or_null,
    **dict.fromkeys(("n", "batch_size", "concurrency"), whole(1)),
    "logprobs": whole(0),
    "template": FLAG.or_null,
    **dict.fromkeys(("requests_per_minute", "tokens_per_minute"), RATE),
    **dict.fromkeys(("price_in", "price_out", "budget"), number(least=0).or_null),
    "timeout": number(above=0),
    "retries": whole(0),
}
OF_LOCAL = ("batch_size", "template")
OF_SERVER = (
    *("concurrency", "requests_per_minute", "tokens_per_minute", "price_in", "price_out", "budget"),
    *("currency", "timeout", "retries", "key_env"),
)
# what decides which text is written; all others may change when a run goes on
DECIDING = ("model", "server", "system", "form", "max_new_tokens", "temperature", "top_p", "seed", "n", "logprobs")


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`generate`."""

    prompts: str
    out: str
    model: str
    server: str | None = None
    references: str | None = None
    system: str | None = None
    form: str | None = None
    max_new_tokens: int = 256
    temperature: float | None = 1.0
    top_p: float | None = None
    seed: int | None = 0
    n: int = 1
    logprobs: int = 0
    # of a local model
    batch_size: int = 8
    template: bool | None = None
    # of a server
    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    price_in: float | None = None
    price_out: float | None = None
    budget: float | None = None
    currency: str = "EUR"
    timeout: float = 60.0
    retries: int = 5
    key_env: str | None = None


def checked(given: dict[str, Any]) -> Options:
    """Check arguments. ``KdError`` names each that is unknown, missing, or has a value that is not allowed."""
    names = [one.name for one in fields(Options)]
    refuse([f"{name} is not an argument of generate{did_you_mean(name, names)}" for name in given if name not in names])
    refuse([f"{name}=… is missing" for name in ("prompts", "out", "model") if given.get(name) is None])
    refuse(refusals("", given, RULES))
    others, why = (OF_LOCAL, "a local model, not for") if given.get("server") else (OF_SERVER, "a server: give")
    refuse([f"{name} is for {why} server=…" for name in others if name in given])
    found = Options(**given)
    problems = []
    if not found.out.endswith(".jsonl") or found.out.endswith(".partial.jsonl"):
        problems.append(f"out = {found.out} is not allowed: its name must end in .jsonl")
    if Path(found.out).resolve() == Path(found.prompts).resolve():
        problems.append("out is the file of the prompts: give another name")
    if (found.price_in is None) != (found.price_out is None):
        problems.append("price_in and price_out belong together: give both, of a million tokens")
    if found.budget is not None and found.price_in is None:
        problems.append(f"budget = {found.budget:g} needs price_in and price_out, of a million tokens")
    if found.n > 1 and found.temperature == 0:
        problems.append(f"n = {found.n} is not allowed with temperature = 0: all samples of a prompt would be the same")
    refuse(problems)
    return found


def settings(chosen: Options) -> dict[str, Any]:
    """Return what decides which texts are written."""
    found = {name: getattr(chosen, name) for name in DECIDING}
    if chosen.server:
        return {**found, "server": endpoint(chosen.server)}
    return {**found, **{name: getattr(chosen, name) for name in OF_LOCAL}, "weights": _weights(Path(chosen.model))}


def _weights(folder: Path) -> str | None:
    """Hash the first and last bytes of a folder's weights: a model that was trained anew is another one."""
    files = [f for f in sorted(folder.rglob("*")) if f.suffix in (".safetensors", ".bin", ".gguf")]
    found = hashlib.blake2b(digest_size=8)
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as content:
            found.update(f"{file.name} {size}".encode() + content.read(1 << 20))
            content.seek(max(0, size - (1 << 20)))
            found.update(content.read())
    return found.hexdigest() if files else None
