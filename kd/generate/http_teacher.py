"""A teacher behind an HTTP server of OpenAI's protocol (chat completions): requests and retries. No torch."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import requests
import urllib3

from kd.errors import KdError, counted
from kd.generate.attempts import Attempts
from kd.generate.chat_answer import Declined, Malformed, OtherForm, completion, shown, words_of
from kd.generate.ledger import Ledger, Pace, Usage
from kd.generate.prompts import Prompt
from kd.generate.threads import Failed, Stopped
from kd.records.generations import Completion

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second attempt, and before any
PATIENCE = 600.0  # seconds that a server may ask to wait; after that it is better to come back
MOST_BYTES = 64 << 20  # of an answer
AGAIN = (408, 409, 425, 429)  # and 500 or more: the same request may succeed later
NEVER = ("insufficient_quota", "billing_hard_limit_reached")  # codes of 429 that waiting does not help
# codes of 400 that are about one prompt: the others may succeed
OF_THE_PROMPT = ("context_length_exceeded", "content_filter", "content_policy_violation", "string_above_max_length")


class Again(Exception):
    """An attempt failed; the next one may succeed.

    ``after``: seconds to wait that the server names; ``usage``: what it took; ``unknown``: it may have been charged;
    ``other_form``: the answer is another thing than a completion.
    """

    def __init__(
        self,
        reason: str,
        after: float | None = None,
        usage: Usage | None = None,
        unknown: bool = False,
        other_form: bool = False,
    ) -> None:
        super().__init__(reason)
        self.after, self.usage, self.unknown, self.other_form = after, usage, unknown, other_form


class Reply(NamedTuple):
    """A completion, and what the attempts before it cost."""

    completion: Completion
    wasted: float


class _Key(requests.auth.AuthBase):
    """Sends the key; given to requests as such, so that no password of ``.netrc`` takes its place."""

    def __init__(self, key: str | None) -> None:
        self.key = key

    def __call__(self, request: Any) -> Any:
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


@dataclass
class HttpTeacher:
    """Asks a server for completions, one a request.

    ``url``: of the chat completions, from :func:`endpoint`; ``key``: of the server, never written or printed.
    ``sampling``: fields of the request (max_tokens, temperature …), of which None is left out; ``seed`` is that of the
    first sample, the others count on. ``logprobs``: alternatives of each token. ``timeout``: seconds for an answer from
    the first byte to the last; ``retries``: attempts after the first one; ``attempts``: counts those that fail.
    """

    url: str
    model: str
    key: str | None
    key_env: str
    sampling: dict[str, Any]
    logprobs: int
    ledger: Ledger
    pace: Pace
    system: str | None = None
    timeout: float = 60.0
    retries: int = 5
    attempts: Attempts = field(default_factory=Attempts)

    def __post_init__(self) -> None:
        self._local = threading.local()
        self._tokens_field = "max_tokens"

    def ask(self, prompt: Prompt, sample: int, stop: threading.Event) -> Reply:
        """Ask until there is a completion, with waits that double.

        Raises ``Failed`` when there is none after all attempts, ``Stopped`` when the run ends meanwhile, ``KdError``
        when no other prompt would fare better: the key, the model or the address are wrong, or it is no such server.
        """
        wasted = 0.0
        for attempt in range(self.retries + 1):
            try:
                with self.ledger.reserved(prompt.size, stop) as expected:
                    self.pace.wait(expected.tokens_in + expected.tokens_out, stop)
                    return Reply(self._settled(self._once(prompt, sample), prompt), wasted)
            except Declined as error:
                wasted += self.ledger.settle(error.usage or Usage())
                raise Failed(str(error), wasted, of_the_server=False) from None
            except Again as error:
                usage = error.usage or (self.ledger.expected(prompt.size) if error.unknown else Usage())
                wasted += self.ledger.settle(usage)
                if error.other_form:
                    self.attempts.of_another_form(self.url, str(error))
                if attempt == self.retries:
                    raise Failed(f"{error} ({counted(attempt + 1, 'attempt')})", wasted) from None
                self.attempts.failed(prompt.index + 1, str(error), attempt + 1, self.retries)
                self._wait(attempt, error.after, stop)
        raise AssertionError("unreachable")

    def _settled(self, found: Completion, prompt: Prompt) -> Completion:
        usage = Usage(found.tokens_in, found.tokens_out)
        self.ledger.settle(usage, prompt.size)
        return replace(found, cost=self.ledger.cost(usage))

    def _wait(self, attempt: int, after: float | None, stop: threading.Event) -> None:
        if after is not None and after > PATIENCE:
            raise KdError(f"the server asks to wait for {after / 60:.0f} minutes")
        if after is not None:
            self.pace.pause(after)  # all threads: a rate limit is that of the key
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.5)
        if stop.wait(max(wait, after or 0.0)):
            raise Stopped

    def given_up(self, prompt: Prompt) -> float:
        """Return what an answer that is not waited for any more may cost: 0 without prices."""
        return self.ledger.settle(self.ledger.expected(prompt.size))

    # ------------------------------------------------------------------ one request

    def _body(self, prompt: Prompt, sample: int) -> dict[str, Any]:
        fields = {name: value for name, value in self.sampling.items() if value is not None}
        if "max_tokens" in fields:
            fields[self._tokens_field] = fields.pop("max_tokens")
        if "seed" in fields:
            fields["seed"] += sample
        if self.logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.logprobs}
        return {"model": self.model, "messages": prompt.messages(self.system), **fields}

    def _once(self, prompt: Prompt, sample: int) -> Completion:
        field = self._tokens_field
        status, headers, content = self._post(self._body(prompt, sample))
        if status == 400 and field == "max_tokens" and "max_completion_tokens" in words_of(content)[1]:
            self._tokens_field = "max_completion_tokens"  # the newer name, which some models insist on
            status, headers, content = self._post(self._body(prompt, sample))
        if status == 200:
            return self._completion(content, headers.get("Content-Type"), prompt)
        code, said = words_of(content)
        reason = self._clean(f"the server answers {status}: {said}" if said else f"the server answers {status}")
        if (status in AGAIN or status >= 500) and code not in NEVER:
            raise Again(reason, retry_after(headers.get("Retry-After")))
        if code in OF_THE_PROMPT or status == 413:
            raise Declined(reason)
        raise KdError(self._stopped_by(status, reason))

    def _completion(self, content: bytes, media: str | None, prompt: Prompt) -> Completion:
        try:
            found = completion(content, self.model, prompt.size, self.logprobs, media)
        except Malformed as error:
            other = isinstance(error, OtherForm)
            raise Again(self._clean(str(error)), usage=error.usage, unknown=True, other_form=other) from None
        except Declined as error:
            self.attempts.answered = True
            declined = Declined(self._clean(str(error)))
            declined.usage = error.usage
            raise declined from None
        self.attempts.answered = True
        return found

    def _stopped_by(self, status: int, reason: str) -> str:
        key = f"with the key in {self.key_env}" if self.key else f"without a key: there is none in {self.key_env}"
        hint = f" (asked {key})" if status in (401, 403) else f" (model = {self.model})" if status == 404 else ""
        hint = " (a redirection is not followed: the key would go along)" if 300 <= status < 400 else hint
        return f"server = {self.url}: {reason}{hint}"

    def _post(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        """Send a request and read the whole answer within ``timeout`` seconds: status, headers, content."""
        deadline = time.monotonic() + self.timeout
        try:
            with self._session().post(
                self.url,
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
                auth=_Key(self.key),
                timeout=self.timeout,
                allow_redirects=False,
                stream=True,
            ) as response:
                return response.status_code, response.headers, self._read(response.raw, deadline)
        except requests.exceptions.SSLError as error:
            raise KdError(self._clean(f"server = {self.url}: no safe connection ({_reason(error)})")) from None
        except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, TimeoutError):
            raise Again(f"no whole answer in timeout = {self.timeout:g} seconds", unknown=True) from None
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise Again(self._clean(f"the connection failed ({_reason(error)})")) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Again(self._clean(f"the connection broke ({_reason(error)})"), unknown=True) from None

    def _read(self, raw: Any, deadline: float) -> bytes:
        """Read in pieces as they come: a server that sends a byte now and then never runs into a timeout of reads."""
        read = getattr(raw, "read1", raw.read)
        parts, size = [], 0
        while part := read(1 << 16, decode_content=True):
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise Again(f"the answer is longer than {MOST_BYTES >> 20} MiB", unknown=True)
            if time.monotonic() > deadline:
                raise TimeoutError
        return b"".join(parts)

    def _session(self) -> requests.Session:
        """Return the connection, one a thread."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        session: requests.Session = self._local.session
        return session

    def _clean(self, text: str) -> str:
        """Return words of a server as they are printed: see :func:`~kd.generate.chat_answer.shown`."""
        return shown(text, self.key)


def _reason(error: BaseException) -> str:
    """Name the innermost cause of an error of requests, in one line."""
    found: BaseException = error
    for _ in range(10):
        inner = getattr(found, "reason", None) or next((a for a in found.args if isinstance(a, BaseException)), None)
        if not isinstance(inner, BaseException):
            break
        found = inner
    text = found.strerror if isinstance(found, OSError) and found.strerror else str(found).rpartition(": ")[2]
    return text or type(found).__name__


def retry_after(value: str | None) -> float | None:
    """Read a Retry-After header, seconds or a date (RFC 9110, 10.2.3): seconds from now, None where it says nothing."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except (ValueError, TypeError, IndexError):
            return None
        when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
        seconds = (when - datetime.now(timezone.utc)).total_seconds()
    return min(max(0.0, seconds), 1e9) if seconds == seconds else None
