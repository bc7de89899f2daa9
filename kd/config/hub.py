"""Whether the Hugging Face hub can be asked. No torch."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit


def online() -> bool:
    """Tell whether the name of the Hugging Face hub resolves: without, the libraries try for a minute."""
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def reason(error: BaseException) -> str:
    """Return why transformers did not load something, without a full stop: code of others is not run, or its words."""
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which is not run"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .")
