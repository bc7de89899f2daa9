"""A flagship model behind an API labels the log; a local server stands for it.

    python experiments/customer_service/flagship.py RUN

RUN is the fine-tuned teacher of the study. The server speaks OpenAI's protocol and answers each question with the name
of the intent that RUN gives it, with the tokens that question, instruction and answer have. ``kd generate`` asks it for
the labels of ``log.csv``, at 10 € and 40 € a million tokens: first with a budget that ends in between, then with one
that is enough. The answers become ``answers.csv`` beside ``log.csv``; those that name no intent are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pandas as pd
from questions import FOLDER
from transformers import AutoTokenizer

import kd

PRICES = ("price_in=10", "price_out=40", "currency=€")
BUDGETS = ("5", "30")


class Flagship(ThreadingHTTPServer):
    """The server: ``labels``, question → answer; ``count``, the tokens of a text."""

    daemon_threads = True

    def __init__(self, labels: dict[str, str], count: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.labels, self.count = labels, count


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Flagship

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Answer a chat completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.server.labels[body["messages"][-1]["content"]]
        count = self.server.count
        usage = {
            "prompt_tokens": sum(count(message["content"]) for message in body["messages"]),
            "completion_tokens": count(answer),
        }
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        content = json.dumps({"id": "0", "model": body["model"], "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main(run: str) -> int:
    """Label the log, once: another server has another port, and `kd generate` goes on with the same alone."""
    if (FOLDER / "answers.csv").is_file():
        print(f"{FOLDER / 'answers.csv'} is there")
        return 0
    teacher = kd.load(run, weights="last")
    questions = pd.read_csv(FOLDER / "log.csv", dtype=str)["prompt"].tolist()
    labels = {found.input: str(found.label) for found in teacher.predict(questions, batch_size=128)}
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/last", model_max_length=10_000)
    server = Flagship(labels, lambda text: len(tokenizer.tokenize(text)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    system = f"Name the intent of the customer's question, one of: {', '.join(teacher.class_names)}"
    command = ["kd", "generate", f"prompts={FOLDER / 'log.csv'}", f"out={FOLDER / 'answers.jsonl'}"]
    command += [f"server=http://127.0.0.1:{server.server_port}", "model=flagship", f"system={system}", *PRICES]
    command += ["max_new_tokens=20", "temperature=0"]
    for budget in BUDGETS:
        code = subprocess.call([*command, f"budget={budget}"])
    server.shutdown()
    if code:
        return code
    answers = pd.read_json(FOLDER / "answers.jsonl", lines=True)
    named = answers[answers["completion"].isin(teacher.class_names)]
    table = named[["prompt", "completion"]].rename(columns={"prompt": "text", "completion": "category"})
    table.to_csv(FOLDER / "answers.csv", index=False)
    gold = pd.read_csv(FOLDER / "log_gold.csv", dtype=str)
    both = table.merge(gold, on="text", suffixes=("", "_gold"))
    right = (both["category"] == both["category_gold"]).mean()
    said = f"{len(table):,} answers, {100 * right:.1f} % of them as the label of the set"
    print(f"{FOLDER / 'answers.csv'}: {said}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the run of the teacher: python flagship.py RUN")
    sys.exit(main(sys.argv[1]))
