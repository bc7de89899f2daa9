"""``kd generate``: a local server that fails, stalls, truncates and lies, and a small local model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kd.data.text.teacher_tokens import token_bytes
from kd.errors import KdError
from kd.generate import http_teacher
from kd.generate.chat_answer import Declined, Malformed, completion
from kd.generate.generate import Terminated, generate
from kd.generate.http_teacher import retry_after
from kd.generate.ledger import BudgetReached, Ledger, Pace, Usage
from kd.generate.prompts import read_prompts
from kd.generate.server_address import endpoint, key_for
from kd.generate.summary import Summary
from kd.generate.threads import Stopped
from kd.records.generations import opened
from tests.chat_server import Server, answer, choice, drips, fails, sends, serving, stalls, truncates

KEY = "sk-very-secret-1234"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http_teacher, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as found:
        yield found


@pytest.fixture
def ask(server: Server, tmp_path: Path) -> Callable[..., Summary]:
    """``ask("a", "b", retries=1)``: generate for these prompts with the server."""

    def run(*prompts: str, **options: Any) -> Summary:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        defaults = {"server": server.url, "model": "teacher", "retries": 2, "timeout": 5.0}
        return generate(file, tmp_path / "out.jsonl", **{**defaults, **options})

    return run


def lines(folder: Path, name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# ---------------------------------------------------------------------- what is written


def test_completions_are_in_the_order_of_the_prompts_and_each_is_asked_once(ask, server, tmp_path) -> None:
    server.script["a"] = [lambda handler: (time.sleep(0.1), sends(answer("re: a"))(handler))]
    summary = ask("a", "b", "a", "c", price_in=1.0, price_out=2.0)
    assert sorted(server.asked()) == ["a", "b", "c"]
    assert [(row["prompt"], row["completion"], row["row"]) for row in lines(tmp_path)] == [
        ("a", "re: a", 1),
        ("b", "re: b", 2),
        ("c", "re: c", 4),
    ]
    first = lines(tmp_path)[0]
    assert (first["model"], first["finish_reason"], first["tokens_in"], first["tokens_out"]) == (
        "teacher-1",
        "stop",
        10,
        5,
    )
    assert first["cost"] == pytest.approx(20e-6)
    assert summary.cost == pytest.approx(60e-6)
    assert (summary.prompts, summary.repeated, summary.done, summary.failed) == (3, 1, 3, {})
    assert not list(tmp_path.glob("*.partial.jsonl")) + list(tmp_path.glob(".*"))


def test_the_request_has_what_was_asked_for(ask, server) -> None:
    ask("a", system="Be brief.", top_p=0.9, seed=7, n=2, logprobs=3, temperature=None, concurrency=1)
    first, second = server.requests
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    assert (first["seed"], second["seed"]) == (7, 8)
    assert "temperature" not in first
    wanted = {"model": "teacher", "max_tokens": 256, "top_p": 0.9, "logprobs": True, "top_logprobs": 3}
    assert wanted.items() <= first.items()
    path, headers = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_what_is_written_is_training_data(ask, server, tmp_path) -> None:
    from kd.data.text.dialogues import Dialogue, dialogues
    from kd.data.text.records import read_file

    ask("a")
    wanted = Dialogue("are: a", [(1, 6)], True, True, [(1, 6)])
    assert dialogues(read_file(tmp_path / "out.jsonl", "utf-8"), None) == [wanted]


def test_messages_stay_messages(ask, server, tmp_path) -> None:
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "old"}]
    file.write_text(json.dumps({"messages": turns}))
    generate(file, tmp_path / "chats_out.jsonl", "teacher", server.url)
    (row,) = lines(tmp_path, "chats_out.jsonl")
    assert row["prompt"] == turns[:1]
    assert row["completion"] == [{"role": "assistant", "content": "re: hi"}]
    ask("a", form="messages", system="Be brief.")
    assert [m["role"] for m in lines(tmp_path)[0]["prompt"]] == ["system", "user"]


def test_log_probabilities_and_answers_that_were_cut_off(ask, server, tmp_path) -> None:
    tops = [{"token": "x", "logprob": -0.5}, {"token": "y", "logprob": -1.5}]
    given = {"content": [{"token": "x", "logprob": -0.5, "bytes": [120], "top_logprobs": tops}]}
    server.script["a"] = [sends(choice(logprobs=given, finish_reason="length"))]
    summary = ask("a", "b", logprobs=2)
    first, second = lines(tmp_path)
    assert first["logprobs"] == [{"token": "x", "logprob": -0.5, "top": [["x", -0.5], ["y", -1.5]]}]
    assert "logprobs" not in second
    assert (summary.truncated, summary.without_logprobs) == (1, 1)
    server.script["c"] = [sends(choice(logprobs={"content": [{"token": "x", "logprob": -0.5, "top_logprobs": []}]}))]
    assert ask("a", "b", "c", logprobs=2).without_logprobs == 2  # none of the likeliest tokens


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([{"token": "x", "logprob": 1.5}], "token 1: logprob = 1.5 of 'x' must be a number, at most 0"),
        ([{"token": "x", "logprob": -1.0}, {"token": 3}], "token 2: it is no {token, logprob, bytes, top_logprobs}"),
        (
            [{"token": "x", "logprob": -1.0, "top_logprobs": [{"token": "y", "logprob": "z"}]}],
            "token 1: logprob = z of 'y' must be a number, at most 0",
        ),
        (["x"], "token 1: it is no {token, logprob, bytes, top_logprobs}"),
        ([{"token": None, "logprob": -1.0}], "token 1: token = 'None' must be a text"),
        ("x", "the log-probabilities are no list of tokens: {'content': 'x'}"),
    ],
)
def test_what_is_wrong_with_log_probabilities_is_said(tokens: Any, said: str) -> None:
    body = json.dumps(choice(logprobs={"content": tokens})).encode()
    with pytest.raises(Malformed, match=re.escape(said)):
        completion(body, "m", 1, 1)


@pytest.mark.parametrize(
    ("told", "written", "cut"),
    [("stop", "stop", 0), ("length", "length", 1), ("eos_token", "stop", 0), ("model_length", "length", 1)],
)
def test_why_a_completion_ended_is_written_in_the_words_of_openai(ask, server, tmp_path, told, written, cut) -> None:
    server.script["a"] = [sends(choice(finish_reason=told))]
    assert ask("a").truncated == cut
    assert lines(tmp_path)[0]["finish_reason"] == written


def test_a_server_that_counts_no_tokens(ask, server, tmp_path) -> None:
    server.otherwise = lambda body: sends(answer("four letters", usage=None))
    summary = ask("12345678")
    assert summary.estimated == 1
    assert (lines(tmp_path)[0]["tokens_in"], lines(tmp_path)[0]["tokens_out"]) == (2, 3)


# ---------------------------------------------------------------------- servers that fail


BROKEN = {
    "500": fails(500),
    "429": fails(429, Retry_After="0"),
    "truncates": truncates,
    "stalls": stalls(1.0),
    "drips": drips(1.0),
    "hangs up": lambda handler: handler.connection.close(),
    "no JSON": sends(b"<html>bad gateway</html>"),
    "not an object": sends([1, 2]),
    "an error with 200": sends({"error": {"message": "overloaded"}}),
    "no choices": sends(answer(choices=[])),
    "choices of another type": sends(answer(choices="fine")),
    "no message": sends(answer(choices=[{"finish_reason": "stop"}])),
    "no content": sends(answer(None)),
    "empty content": sends(answer("")),
    "content of another type": sends(answer(["fine"])),
    "content that is not Unicode": sends(answer("\ud800")),
    "a reason of another type": sends(choice(finish_reason=3)),
    "deep nesting": sends(b"[" * 100_000),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=list(BROKEN))
def test_a_request_that_fails_is_repeated(broken, ask, server, tmp_path) -> None:
    server.script["a"] = [broken]
    summary = ask("a", timeout=0.3)
    assert (summary.done, summary.failed) == (1, {})
    assert server.asked() == ["a", "a"]
    assert lines(tmp_path)[0]["completion"] == "re: a"


def test_wrong_log_probabilities_are_refused(ask, server) -> None:
    wrong = {"content": [{"token": "x", "logprob": 0.5}]}
    server.script["a"] = [sends(choice(logprobs=wrong)), sends(choice(logprobs={"content": "x"}))]
    assert ask("a", logprobs=1).done == 1
    assert len(server.requests) == 3


def test_what_fails_again_and_again_is_no_completion(ask, server, tmp_path) -> None:
    server.script["b"] = [sends(answer(choices=[]))] * 9
    summary = ask("a", "b", "c", retries=1, price_in=1.0, price_out=1.0)
    assert list(summary.failed) == [2]
    assert "no choices" in summary.failed[2]
    assert "2 attempts" in summary.failed[2]
    assert [row["prompt"] for row in lines(tmp_path)] == ["a", "c"]
    assert summary.cost == pytest.approx(60e-6)  # the two attempts are charged as well
    server.script.clear()
    again = ask("a", "b", "c", price_in=1.0, price_out=1.0)
    assert server.asked().count("b") == 3
    assert server.asked().count("a") == 1
    assert [row["prompt"] for row in lines(tmp_path)] == ["a", "b", "c"]
    assert again.cost == pytest.approx(75e-6)


def test_a_prompt_that_the_server_declines_is_not_repeated(ask, server) -> None:
    server.script |= {
        "a": [fails(400, "too long", "context_length_exceeded")],
        "b": [sends(choice(finish_reason="content_filter"))],
        "c": [sends(choice(message={"content": None, "refusal": "I cannot"}))],
        "d": [sends(choice(message={"content": ""}, finish_reason="length"))],
    }
    summary = ask("a", "b", "c", "d", "e")
    assert (summary.done, list(summary.failed)) == (1, [1, 2, 3, 4])
    assert len(server.requests) == 5


def test_retry_after_holds_all_requests_back(ask, server, monkeypatch) -> None:
    at: list[float] = []
    normal = server.otherwise

    def otherwise(body: dict[str, Any]) -> Any:
        at.append(time.monotonic())
        return normal(body)

    server.otherwise = otherwise
    began = time.monotonic()
    server.script["a"] = [fails(429, Retry_After="0.4")]
    assert ask("a", "b", concurrency=1).done == 2
    assert at[0] - began >= 0.4


def test_a_server_that_asks_to_wait_for_hours_ends_the_run(ask, server) -> None:
    server.script["a"] = [fails(503, Retry_After="7200")]
    with pytest.raises(KdError, match="asks to wait for 120 minutes"):
        ask("a")


def test_a_server_that_fails_all_prompts_ends_the_run(ask, server) -> None:
    server.otherwise = lambda body: fails(500, "out of order")
    with pytest.raises(KdError, match=r"failed \d+ prompts in a row, the last one with: the server answers 500: out"):
        ask(*map(str, range(40)), retries=0, concurrency=2)
    assert len(server.requests) < 20


STOPS = {
    400: ("bad field", None, "server answers 400: bad field"),
    401: (f"wrong key {KEY}", None, r"401: wrong key \[key\] \(asked with the key in OPENAI_API_KEY\)"),
    403: ("not yours", None, "403: not yours"),
    404: ("no such model", None, r"404: no such model \(model = teacher\)"),
    422: ("unknown field", None, "422: unknown field"),
    429: ("pay first", "insufficient_quota", "429: pay first"),
    302: ("elsewhere", None, r"answers 302.* \(a redirection is not followed"),
}


@pytest.mark.parametrize("status", STOPS)
def test_what_no_repetition_helps_stops_at_once(status, ask, server) -> None:
    message, code, sentence = STOPS[status]
    server.otherwise = lambda body: fails(status, message, code, Location="http://localhost:1/")
    with pytest.raises(KdError, match=sentence) as found:
        ask("a", "b", concurrency=1)
    assert KEY not in str(found.value)
    assert "\n" not in str(found.value)
    assert len(server.requests) == 1


LOGIN = b"<html>please log in</html>"
OTHER_FORMS = {
    "a page": (sends(LOGIN, Content_Type="text/html; charset=utf-8"), r"is not JSON \(text/html\): <html>please"),
    "no choices": (sends(answer(choices=[])), "has no choices"),
    "no content": (sends(answer(None)), "the content of the message is null"),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_a_server_of_another_protocol_is_given_up_at_once(form, ask, server) -> None:
    send, sentence = OTHER_FORMS[form]
    server.otherwise = lambda body: send
    with pytest.raises(KdError, match=rf"^server = {server.url}.* something else than .* 3 answers.*{sentence}"):
        ask("a", "b", retries=9, concurrency=1)
    assert len(server.requests) == 3


def test_a_server_that_has_answered_once_is_not_given_up(ask, server) -> None:
    server.script["b"] = [OTHER_FORMS["a page"][0]] * 4
    assert ask("a", "b", retries=4, concurrency=1).done == 2


def test_errors_and_truncated_answers_are_no_other_protocol(ask, server) -> None:
    server.script["a"] = [sends({"error": {"message": "overloaded"}}), truncates, sends(answer("")), fails(500)]
    assert ask("a", retries=4).done == 1


def test_the_first_failed_attempt_of_a_kind_is_logged_and_all_are_counted(ask, server, caplog) -> None:
    server.script |= {"b": [OTHER_FORMS["a page"][0], fails(500)], "c": [OTHER_FORMS["a page"][0]]}
    summary = ask("a", "b", "c", concurrency=1, retries=5)
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("kd.")]
    assert [message.partition("; trying again ")[::2] for message in logged] == [
        ("row 2: the answer is not JSON (text/html): <html>please log in</html>", "1/5 (further ones are counted)"),
        ("row 2: the server answers 500: no", "2/5 (further ones are counted)"),
    ]
    assert summary.again == {"the answer is not JSON (text/html)": 2, "the server answers 500": 1}


@pytest.mark.parametrize("place", [0, 270, 290])
def test_no_part_of_the_key_is_left_in_words_of_the_server(place, ask, server, tmp_path, caplog) -> None:
    """Where a long message is cut as well, in errors, refusals and answers that are no JSON."""
    said = "x" * place + KEY + "y" * 300
    server.script |= {
        "a": [fails(500, said)],
        "b": [sends(choice(message={"content": None, "refusal": said}))],
        "c": [sends(said.encode())],
    }
    summary = ask("a", "b", "c", "d", concurrency=1)
    written = "".join(file.read_text() for file in tmp_path.iterdir())
    for text in (caplog.text, str(summary), written):
        assert KEY[:8] not in text
    assert "[key]" in caplog.text or place
    server.otherwise = lambda body: fails(401, said)
    with pytest.raises(KdError, match="401") as found:
        ask("a", "b", "c", "d", "e")
    assert KEY[:8] not in str(found.value)


def test_the_newer_name_of_max_tokens(ask, server) -> None:
    normal = server.otherwise
    refused = fails(400, "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")
    server.otherwise = lambda body: refused if "max_tokens" in body else normal(body)
    assert ask("a", "b", concurrency=1).done == 2
    assert [r.get("max_completion_tokens") for r in server.requests] == [None, 256, 256]


def test_a_server_that_is_not_there(ask, server) -> None:
    with pytest.raises(KdError, match=r"no prompt has a completion: the connection failed .* \(1 attempt\)$"):
        ask("a", server="http://127.0.0.1:1", retries=0)


# ---------------------------------------------------------------------- going on


def test_a_killed_run_goes_on_where_it_was(ask, server, tmp_path) -> None:
    server.script["c"] = [fails(401)]
    with pytest.raises(KdError, match=r"2 of 3 completions are kept in .*: the same command goes on"):
        ask("a", "b", "c", concurrency=1)
    partial = tmp_path / "out.partial.jsonl"
    assert not (tmp_path / "out.jsonl").exists()
    content = partial.read_bytes()
    partial.write_bytes(content[:-20])  # killed while it wrote the second completion
    summary = ask("a", "b", "c", "d", concurrency=1)
    assert server.asked() == ["a", "b", "c", "b", "c", "d"]
    assert summary.done == 4
    assert [row["completion"] for row in lines(tmp_path)] == ["re: a", "re: b", "re: c", "re: d"]
    assert not partial.exists()
    ask("a", "b", "c", "d")
    assert len(server.requests) == 6


CHANGED = {"model": "other", "temperature": 0.5, "system": "Be rude.", "seed": 1, "n": 2, "max_new_tokens": 8}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("name", CHANGED)
def test_other_settings_are_refused(name, complete, ask, server, tmp_path) -> None:
    if not complete:
        server.script["b"] = [fails(401)]
        with pytest.raises(KdError):
            ask("a", "b", concurrency=1)
    else:
        ask("a", "b")
    count = len(server.requests)
    with pytest.raises(KdError, match=rf"^{name} = {CHANGED[name]} is not what the completions in .* were made with"):
        ask("a", "b", **{name: CHANGED[name]})
    assert len(server.requests) == count
    assert ask("a", "b", concurrency=2, timeout=4).done == 2  # these may change


def test_settings_under_which_nothing_was_completed_may_be_mended(ask, server) -> None:
    server.script["a"] = [fails(401)]
    with pytest.raises(KdError):
        ask("a", concurrency=1, max_new_tokens=8)
    assert ask("a", concurrency=1, max_new_tokens=9).done == 1


def test_completions_of_other_prompts_are_not_thrown_away(ask, tmp_path) -> None:
    ask("a", "b")
    with pytest.raises(KdError, match="has completions of 1 prompt not in"):
        ask("a", "c")
    assert len(lines(tmp_path)) == 2


def test_a_file_of_something_else_is_left_alone(ask, server, tmp_path) -> None:
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(KdError, match="was not written by kd generate"):
        ask("a")
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    assert not server.requests


def test_two_processes_do_not_write_one_file(ask, server, tmp_path) -> None:
    with opened(tmp_path / "out.jsonl", {}), pytest.raises(KdError, match="is being written by another process"):
        ask("a")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_under_way(number, ask, server, tmp_path) -> None:
    def interrupt(handler: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        sends(answer("re: b"))(handler)

    server.script["b"] = [interrupt]
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="2 of 3 completions are kept"):
        ask("a", "b", "c", concurrency=1)
    assert signal.getsignal(number) is before
    assert server.asked() == ["a", "b"]
    assert ask("a", "b", "c").done == 3
    assert server.asked() == ["a", "b", "c"]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_answers_that_do_not_come_are_given_up_after_an_interruption(number, error, ask, server, tmp_path) -> None:
    """What is written stays, what is asked again is asked once, and what the server may charge is counted."""
    released = threading.Event()

    def stall(handler: Any) -> None:
        os.kill(os.getpid(), number)
        released.wait(30)

    prices = {"price_in": 1.0, "price_out": 1.0}
    server.script["b"] = [stall]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match="1 of 3 completions are kept") as found:
        ask("a", "b", "c", concurrency=1, timeout=30, **prices)
    assert type(found.value) is error
    assert time.monotonic() - began < 10
    _, first, second = lines(tmp_path, "out.partial.jsonl")
    assert first["completion"] == "re: a"
    assert second["failed"] == "the run was interrupted before the answer came"
    assert second["wasted"] == pytest.approx(15e-6)  # as long as the one answer before
    released.set()
    assert ask("a", "b", "c", **prices).cost == pytest.approx(60e-6)
    assert sorted(server.asked()) == ["a", "b", "b", "c"]  # b and c at once, in any order
    assert [row["completion"] for row in lines(tmp_path)] == ["re: a", "re: b", "re: c"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_although_the_server_stalls(number, code, server, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\n")
    released, asked = threading.Event(), threading.Event()
    server.script["b"] = [lambda handler: (asked.set(), released.wait(120))]
    arguments = ["prompts=p.txt", "out=o.jsonl", f"server={server.url}", "model=m", "timeout=100", "concurrency=1"]
    command = [sys.executable, "-m", "kd.cli.main", "generate", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert asked.wait(60)
        began = time.monotonic()
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    released.set()
    assert process.returncode == code
    assert "1 of 2 completions are kept in o.partial.jsonl: the same command goes on" in said
    assert time.monotonic() - began < 20  # about one second on an idle machine


def test_a_full_disk_is_one_sentence(ask, monkeypatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kd.records.generations.os.write", full)
    with pytest.raises(KdError, match=r"out\.partial\.jsonl: No space left on device"):
        ask("a", "b")


# ---------------------------------------------------------------------- money and pace


def test_the_budget_stops_before_the_request_that_would_exceed_it(ask, server, tmp_path) -> None:
    prices = {"price_in": 100_000.0, "price_out": 200_000.0, "max_new_tokens": 5}  # 2 a request
    prompts = ["0" * 20 + str(number) for number in range(10)]
    with pytest.raises(KdError) as found:
        ask(*prompts, budget=7.0, concurrency=4, **prices)
    assert "would exceed budget = 7 EUR (6 EUR are spent); 3 of 10 completions are kept" in str(found.value)
    assert len(server.requests) == 3
    with pytest.raises(KdError, match="5 of 10"):  # what was spent before counts, and is known
        ask(*prompts, budget=11.0, **prices)
    assert ask(*prompts, budget=30.0, **prices).cost == pytest.approx(20.0)
    assert len(server.requests) == 10


def test_requests_wait_for_those_under_way_before_the_budget_is_called_reached() -> None:
    ledger, stop = Ledger(1e6, 0.0, budget=3.0, most_out=1), threading.Event()
    with ledger.reserved(4, stop):
        stop.set()
        with pytest.raises(Stopped), ledger.reserved(4, stop):
            pass
    stop.clear()
    ledger.settle(Usage(2, 0), 4)
    with pytest.raises(BudgetReached), ledger.reserved(4, stop):
        pass


def test_what_is_expected_is_estimated_anew_while_a_request_waits() -> None:
    """Before the first answer a completion is expected to be long; those that wait then know better."""
    ledger, stop = Ledger(0.0, 1e6, budget=110.0, most_out=100), threading.Event()
    entered: list[Usage] = []

    def wait() -> None:
        with ledger.reserved(4, stop) as expected:
            entered.append(expected)

    with ledger.reserved(4, stop):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.05)
        assert not entered
        ledger.settle(Usage(1, 20), 4)
    waiting.join(5)
    assert entered == [Usage(1, 20)]


def test_expectations_are_the_mean_of_the_answers() -> None:
    ledger = Ledger(1.0, 1.0, most_out=100)
    assert ledger.expected(10) == Usage(5, 100)
    ledger.settle(Usage(10, 20), 40)
    ledger.settle(Usage(10, 40), 40)
    assert ledger.expected(8) == Usage(2, 30)


def test_the_pace_is_even() -> None:
    pace, stop = Pace(requests=1200.0), threading.Event()  # one in 50 ms
    began = time.monotonic()
    for _ in range(4):
        pace.wait(1, stop)
    assert 0.15 <= time.monotonic() - began < 1.0
    pace = Pace(tokens=6000.0)
    began = time.monotonic()
    pace.wait(20, stop)
    pace.wait(1, stop)
    assert 0.2 <= time.monotonic() - began < 1.0
    stop.set()
    with pytest.raises(Stopped):
        pace.wait(1, stop)


# ---------------------------------------------------------------------- small parts


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("https://api.x.com/v1/", "https://api.x.com/v1/chat/completions"),
        ("https://x.com/openai/v1", "https://x.com/openai/v1/chat/completions"),
        ("https://x.com/v1/chat/completions", "https://x.com/v1/chat/completions"),
    ],
)
def test_endpoint(server: str, url: str) -> None:
    assert endpoint(server) == url


@pytest.mark.parametrize(
    "server", ["localhost:8000", "ftp://x", "http://", "http://me:pw@x.com", "https://x.com/?k=pw"]
)
def test_an_address_that_cannot_be_used(server: str) -> None:
    with pytest.raises(KdError, match=r"^server = .* is not allowed") as found:
        endpoint(server)
    assert "pw" not in str(found.value)


def test_the_key_goes_nowhere_by_itself_over_plain_http() -> None:
    environment = {"OPENAI_API_KEY": KEY, "MINE": " other\n", "BAD": "ü"}
    assert key_for("https://x.com/v1", None, environment) == (KEY, "OPENAI_API_KEY")
    assert key_for("http://localhost:1/v1", None, environment) == (KEY, "OPENAI_API_KEY")
    assert key_for("http://x.com/v1", None, environment)[0] is None
    assert key_for("http://x.com/v1", "MINE", environment) == ("other", "MINE")
    assert key_for("https://x.com/v1", None, {})[0] is None
    for name in ("NONE", "BAD"):
        with pytest.raises(KdError, match=f"key_env = {name}"):
            key_for("https://x.com/v1", name, environment)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("3") == 3.0
    assert retry_after("-3") == 0.0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after("Wed, 21 Oct 2065 07:28:00 GMT") > 1e8
    assert [retry_after(value) for value in (None, "soon", "nan")] == [None, None, None]


def test_an_answer_keeps_its_usage_when_it_is_refused() -> None:
    for error, body in ((Malformed, answer("")), (Declined, choice(finish_reason="content_filter"))):
        with pytest.raises(error) as found:
            completion(json.dumps(body).encode(), "m", 1, 0)
        assert found.value.usage == Usage(10, 5)


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": -1, "completion_tokens": 5}, {"prompt_tokens": "10"}, [1], 10**400]
)
def test_usage_that_cannot_be_is_estimated(usage: Any) -> None:
    found = completion(json.dumps(answer("12345", usage=usage)).encode(), "m", 8, 0)
    assert (found.tokens_in, found.tokens_out, found.estimated) == (2, 2, True)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "one\n\ntwo\none\n", ["one", "two"]),
        ("p.csv", 'prompt,answer\n"a, b",1\nc,2\n', ["a, b", "c"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}', None),
    ],
)
def test_files_of_prompts(name: str, content: str, expected: list[str] | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    found = [prompt.content for prompt in read_prompts(tmp_path / name)[0]]
    assert found == (expected or ["a", [{"role": "user", "content": "b"}]])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.jsonl", '{"question": "a"}', "must have a column prompt or messages: it has question"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": " "}', r"row 2 of .*p\.jsonl: the prompt is empty"),
        ("p.jsonl", '{"prompt": "\\ud800"}', r"row 1 of .*p\.jsonl: the text is not valid Unicode"),
        (
            "p.jsonl",
            '{"prompt": [{"role": "robot", "content": "b"}]}',
            r"row 1 of .*p\.jsonl: a message must have a role",
        ),
        (
            "p.jsonl",
            '{"messages": [{"role": "assistant", "content": "b"}]}',
            r"row 1 of .*p\.jsonl: the messages are all of",
        ),
        ("p.jsonl", "{", "is not valid JSON in line 1"),
        ("p.pdf", "x", "its ending must be one of"),
    ],
)
def test_prompts_that_cannot_be_read(name: str, content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(KdError, match=sentence):
        read_prompts(tmp_path / name)


# ---------------------------------------------------------------------- the command line


def test_the_command_prints_numbers_and_never_the_key(kd, server, tmp_path) -> None:
    (tmp_path / "p.csv").write_text("prompt,wanted\na,re a\nb,no\na,yes\n")
    arguments = ("generate", "prompts=p.csv", "out=o.jsonl", f"server={server.url}", "model=teacher")
    said = kd(*arguments, "references=wanted", "price_in=1", "price_out=2", "currency=USD", "system=a=b")
    assert said.code == 0, said.err
    assert "o.jsonl: 2 completions of 2 prompts" in said.out
    assert "cost: 0.0000 USD" in said.out
    assert "1 row with the prompt of an earlier one, asked once" in said.out
    assert "exact_match: 0.5000" in said.out
    assert lines(tmp_path, "o.jsonl")[0]["references"] == ["re a", "yes"]
    assert server.requests[0]["messages"][0] == {"role": "system", "content": "a=b"}
    written = "".join(file.read_text() for file in tmp_path.iterdir() if file.is_file())
    assert KEY not in written + said.out + said.err


def test_failed_prompts_are_listed_and_the_exit_code_says_so(kd, server, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\n")
    server.script["b"] = [fails(400, f"too long\x1b[31m {KEY}", "context_length_exceeded")]
    said = kd("generate", "prompts=p.txt", "out=o.jsonl", f"server={server.url}", "model=teacher")
    assert said.code == 1
    assert "kd: row 2 failed: the server answers 400: too long [31m [key]" in said.err
    assert "kd: 1 prompt failed: the same command asks it again" in said.err
    assert "o.jsonl: 1 completion of 2 prompts" in said.out
    assert KEY not in said.err
    assert "\x1b" not in said.err


WRONG = [
    ([], "prompts=… is missing"),
    (["promts=x"], "promts=x is not understood: kd generate has no promts (near: prompts)"),
    (["model"], "model is not understood"),
    (["temperature=hot"], "temperature = hot is not allowed: it must be a finite number, 0 or more, or null"),
    (["n=1.5"], "n = 1.5 is not allowed: it must be a whole number, 1 or more"),
    (["n=2", "temperature=0"], "n = 2 is not allowed with temperature = 0"),
    (["concurrency=2"], "concurrency is for a server"),
    (["server=http://x", "batch_size=2"], "batch_size is for a local model"),
    (["server=http://x", "budget=2"], "budget = 2 needs price_in and price_out"),
    (["server=http://x", "price_in=2"], "price_in and price_out belong together"),
    (["server=nowhere"], "server = nowhere is not allowed"),
    (["out=o.csv"], "out = o.csv is not allowed: its name must end in .jsonl"),
    (["out=no/o.jsonl"], "its folder does not exist"),
    (["prompts=q.txt"], "prompts = q.txt: there is no such file"),
    (["references=wanted"], "references = wanted is no column of p.txt"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_arguments_are_one_sentence(kd, tmp_path, arguments, sentence) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    given = ["prompts=p.txt", "out=o.jsonl", "model=m", *arguments] if arguments else []
    said = kd("generate", *given)
    assert said.code == 1
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert [file.name for file in tmp_path.iterdir()] == ["p.txt"]


# ---------------------------------------------------------------------- a local model


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama and a byte-level tokenizer with a beginning and an end."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LlamaForCausalLM(config)
    with torch.no_grad():  # letters only, and the end now and then
        network.lm_head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    network.save_pretrained(folder)
    return folder


def prompts_file(folder: Path, *prompts: str) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return file


PROMPTS = ["a", "some words", "bc", "the longest of all the prompts", "d"]


def test_a_local_model_writes_what_it_would_alone(model, tmp_path) -> None:
    """Greedy, in padded batches of two: the tokens of a loop without cache, padding and batches."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    summary = generate(
        prompts_file(tmp_path, *PROMPTS), tmp_path / "o.jsonl", model, temperature=0, max_new_tokens=6, batch_size=2
    )
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    found = lines(tmp_path, "o.jsonl")
    assert [row["prompt"] for row in found] == PROMPTS
    for row in found:
        prompt = [1, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] != 2):
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[len(prompt) :]
        assert row["completion"] == tokenizer.decode(new, skip_special_tokens=True)
        assert (row["tokens_in"], row["tokens_out"]) == (len(prompt), len(new))
        assert row["finish_reason"] == ("stop" if new[-1] == 2 else "length")
    assert summary.truncated == sum(row["finish_reason"] == "length" for row in found)


def test_log_probabilities_of_a_local_model(model, tmp_path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    generate(prompts_file(tmp_path, *PROMPTS[:3]), tmp_path / "o.jsonl", model, max_new_tokens=4, logprobs=2)
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    known = token_bytes(tokenizer)
    for row in lines(tmp_path, "o.jsonl"):
        ids = [1, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        for one in row["logprobs"]:
            with torch.no_grad():
                expected = network(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            texts = [one["token"], *(token for token, *_ in one["top"])]
            raws = [one.get("bytes"), *(more[0] if more else None for _, _, *more in one["top"])]
            words = [bytes(raw) if raw else text.encode() for raw, text in zip(raws, texts, strict=True)]
            found = [known[word] if word in known else tokenizer.convert_tokens_to_ids(word.decode()) for word in words]
            ids.append(found[0])
            assert found[1:] == expected.topk(2).indices.tolist()
            assert one["logprob"] == pytest.approx(float(expected[ids[-1]]), abs=1e-4)
            top = [value for _, value, *_ in one["top"]]
            assert top == pytest.approx(expected.topk(2).values.tolist(), abs=1e-4)
        assert len(row["logprobs"]) == row["tokens_out"]


def test_a_local_run_that_goes_on_writes_what_an_uninterrupted_one_does(model, tmp_path, monkeypatch) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 2, "n": 2, "seed": 3}
    file = prompts_file(tmp_path, *PROMPTS)
    generate(file, tmp_path / "whole.jsonl", model, **options)

    class Killed(Exception):
        pass

    def kill(summary: Summary) -> None:
        if summary.done == 5:
            raise Killed

    with pytest.raises(Killed):
        generate(file, tmp_path / "cut.jsonl", model, progress=kill, **options)
    assert len(lines(tmp_path, "cut.partial.jsonl")) == 6
    generate(file, tmp_path / "cut.jsonl", model, **options)
    whole = lines(tmp_path, "whole.jsonl")
    assert lines(tmp_path, "cut.jsonl") == whole
    assert len(whole) == 10
    assert len({row["completion"] for row in whole}) > 5  # samples differ
    generate(file, tmp_path / "other.jsonl", model, **{**options, "seed": 4})
    assert [r["completion"] for r in lines(tmp_path, "other.jsonl")] != [r["completion"] for r in whole]


def test_a_prompt_that_is_too_long_fails_alone(model, tmp_path) -> None:
    summary = generate(prompts_file(tmp_path, "a", "x" * 100), tmp_path / "o.jsonl", model, max_new_tokens=4)
    assert summary.done == 1
    assert "101 tokens and max_new_tokens are more than the 64 positions" in summary.failed[2]


def test_a_model_that_was_trained_anew_is_another_one(model, tmp_path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    file = prompts_file(tmp_path, "a")
    generate(file, tmp_path / "o.jsonl", copy, max_new_tokens=2)
    weights = {name: tensor + 1 for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(KdError, match=r"^weights = "):
        generate(file, tmp_path / "o.jsonl", copy, max_new_tokens=2)


def test_the_chat_template_is_used_where_there_is_one(model, tmp_path) -> None:
    import shutil

    from kd.generate.local_teacher import LocalTeacher, Sampling

    chat = tmp_path / "run" / "selected"  # as a run of kd train leaves it
    shutil.copytree(model, chat)
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    (prompt,), _ = read_prompts(prompts_file(tmp_path, "hi"))
    for options, text in (
        ({}, "<user>hi<a>"),
        ({"system": "s"}, "<system>s<user>hi<a>"),
        ({"template": False}, "<s>hi"),
    ):
        teacher = LocalTeacher(str(tmp_path / "run"), Sampling(), **options)
        assert teacher.tokenizer.decode(teacher.encode(prompt)) == text
    with pytest.raises(KdError, match="system needs a chat template"):
        LocalTeacher(str(model), Sampling(), system="s")


def test_a_classifier_is_no_teacher_that_writes(model, tmp_path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    from kd.generate.local_teacher import LocalTeacher, Sampling

    LlamaForSequenceClassification(LlamaConfig.from_pretrained(model)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    with pytest.raises(KdError, match=r"has no weights for lm_head\.weight: it is no causal language model"):
        LocalTeacher(str(tmp_path), Sampling())


def test_messages_need_a_template(model, tmp_path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "b"}]}')
    with pytest.raises(
        KdError, match=r"the prompts are messages, and the tokenizer of model = .* has no chat template"
    ):
        generate(file, tmp_path / "o.jsonl", model)


def test_a_model_that_is_not_there(tmp_path) -> None:
    with pytest.raises(KdError, match="nowhere"):
        generate(prompts_file(tmp_path, "a"), tmp_path / "o.jsonl", tmp_path / "nowhere")
