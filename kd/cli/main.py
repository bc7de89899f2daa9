"""``kd VERB …``: picks the verb and imports only what that verb needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module

from kd import __version__

VERBS = {
    "train": "train a student, alone or with a teacher (a Hydra application: sweeps with -m)",
    "eval": "measure a run, a checkpoint or a teacher alone on the validation or test split",
    "predict": "answer new images or texts with a run's network: labels and probabilities as csv or jsonl",
    "export": "a run's student as ONNX, torch.export, timm, transformers or safetensors, compared with the run",
    "bench": "parameters, MACs, memory, latency and throughput of a student beside its teacher, with the ratio",
    "generate": "write a teacher's texts for a set of prompts, of a local model or of a server",
    "models": "networks by size, ours and timm's: parameters, MACs, which of them have trained weights",
    "methods": "the loss terms: what each reads, its paper, its formula, and how paper and code differ",
    "study": "run what a study lacks, teachers first, and report it beside the published numbers",
    "search": "the best student within limits of time, size or money: its shape and recipe, with the Pareto front",
    "report": "tables, intervals and figures of a study, a sweep or any runs, as one page",
    "decide": "can the student replace its teacher? what is lost, what the examples show, a cascade, what is saved",
    "cost": "money a month of student and teacher, what is saved a year, and when the training has paid for itself",
    "wandb": "send to Weights & Biases what runs have kept on disk (kd wandb sync)",
    "demo": "three claims of Hinton 2015 on handwritten digits, offline, in a few minutes",
}
MODULES = {
    "train": "kd.cli.train",
    "eval": "kd.cli.evaluate",
    "predict": "kd.cli.predict",
    "export": "kd.cli.export",
    "bench": "kd.cli.bench",
    "generate": "kd.cli.generate",
    "models": "kd.cli.models",
    "methods": "kd.cli.methods",
    "study": "kd.cli.study",
    "search": "kd.cli.search",
    "report": "kd.cli.report",
    "decide": "kd.cli.decide",
    "cost": "kd.cli.cost",
    "wandb": "kd.cli.wandb",
    "demo": "kd.cli.demo",
}


def usage() -> str:
    """Return what ``kd --help`` prints."""
    verbs = "\n".join(f"  {verb:<9}{text}" for verb, text in VERBS.items())
    return f"kd {__version__}: knowledge distillation\n\nkd VERB [arguments]\n\n{verbs}\n\nkd VERB --help says more."


def main(argv: list[str] | None = None) -> int:
    """Run the ``kd`` command, of which this is the entry point. Returns the exit code."""
    args = sys.argv[1:] if argv is None else argv
    if "" not in sys.path:  # so that _target_: mymodule.MyTerm finds a module of the working directory
        sys.path.append("")
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 1
    if args[0] == "--version":
        print(__version__)
        return 0
    verb, *rest = args
    if verb not in MODULES:
        from kd.errors import did_you_mean  # start-up: kd --help needs nothing

        return fail(f"there is no verb {verb}{did_you_mean(verb, VERBS)}; verbs: {', '.join(VERBS)}")
    return guarded(import_module(MODULES[verb]).main, rest)


def guarded(verb: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a verb; bad input becomes one sentence on stderr and exit code 1, an interruption exit code 130."""
    from kd.errors import KdError  # start-up: kd --help needs nothing

    try:
        code = int(verb(arguments) or 0)
        sys.stdout.flush()
        return code
    except KdError as error:
        if os.environ.get("KD_TRACEBACK"):
            raise
        return fail(str(error))
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as interruption:  # with what is kept, where that is known
        return fail(": ".join(["interrupted", *map(str, interruption.args)]), code=130)


def fail(message: str, code: int = 1) -> int:
    """Print the message to stderr, a line for each complaint, and return the exit code."""
    for line in message.splitlines():
        print(f"kd: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
