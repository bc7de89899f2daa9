"""Where a server of OpenAI's protocol answers, and the key that it is given. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from kd.errors import KdError

LOCAL = ("localhost", "127.0.0.1", "::1")


def endpoint(server: str) -> str:
    """Return the address of the chat completions of a server: ``/v1`` is added where there is no path.

    ``KdError`` for what is no HTTP address, and for one with a password or a query, which would be written down.
    """
    try:
        parts = urlsplit(server)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        ok = False
    if not ok or "@" in parts.netloc or parts.query or parts.fragment:
        shown = server.rpartition("@")[2].partition("?")[0]
        raise KdError(
            f"server = {shown} is not allowed: it must be http://HOST or https://HOST, without user and query"
        )
    path = parts.path.rstrip("/") or "/v1"
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return f"{parts.scheme}://{parts.netloc}{path}"


def key_for(url: str, key_env: str | None, environment: Mapping[str, str]) -> tuple[str | None, str]:
    """Return the key for a server, None where there is none, and the name of its variable.

    ``environment``: the variables. The default one, OPENAI_API_KEY, is not sent over plain HTTP to another machine:
    name it to allow that.
    """
    name = key_env or "OPENAI_API_KEY"
    key = (environment.get(name) or "").strip()
    if key_env is not None and not key:
        raise KdError(f"key_env = {key_env}: this variable of the environment is empty or not set")
    if not key.isascii() or not key.isprintable():
        raise KdError(f"key_env = {name}: the key has characters that cannot be sent")
    parts = urlsplit(url)
    if key_env is None and parts.scheme == "http" and parts.hostname not in LOCAL:
        return None, name
    return key or None, name
