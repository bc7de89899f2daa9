"""What lies beside an exported model: its card in Markdown with Hugging Face's fields, and a script that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from kd.deploy.formats import MODEL_FILES
from kd.deploy.student import Student
from kd.records import record
from kd.records.weight_files import SELECTED
from kd.tasks.metrics import Metric, retention

if TYPE_CHECKING:
    from kd.deploy.export import Exported, Options

HUB_TASKS = {  # architecture → pipeline of the hub
    None: "image-classification",
    "sequence_classification": "text-classification",
    "sequence_regression": "text-classification",
    "masked_lm": "fill-mask",
    "causal_lm": "text-generation",
    "question_answering": "question-answering",
    "embedding": "feature-extraction",
}
LIBRARIES = {"timm": "timm", "hf": "transformers", "onnx": "onnx"}
PIXELS = "`images` are bytes, (batch, {}, {}, {}) uint8: the normalisation is inside."
IDS = "Its inputs are {}, (batch, length) int64 each."


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("kd.deploy", ""),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


def script(given: Student, file: str) -> str:
    """Return a script that runs the ONNX file ``file`` without torch, transformers and kd."""
    kind = "images" if given.images else "texts" if given.tokenizer is not None else "vectors"
    shape: tuple[int, ...] = tuple(given.facts.get("input_shape") or ())
    return (
        _environment()
        .get_template("run_onnx.py.j2")
        .render(
            kind=kind,
            file=file,
            square=kind == "images" and shape[1] == shape[2] and given.answers != "mask",
            pairs=given.pairs,
            answers=given.answers,
            causal=given.task.architecture == "causal_lm",
            longest=getattr(given.task, "max_answer_length", None),
        )
    )


def card(given: Student, made: Exported, options: Options, about: Mapping[str, Any]) -> str:
    """Return the model card, with the numbers of the run's record."""
    ran = record.read(given.run)
    main = next(m for m in given.task.metrics if m.name == record.metrics_of(ran)[0]["name"])
    split = "selected" if given.file.name == SELECTED else "last"
    student, teacher = (ran.get("student") or {}), (ran.get("teacher") or {})
    sides = {"student": {**student, **(student.get(split) or {})}, "teacher": teacher}
    found = {side: (part.get("test") or {}).get(main.name) for side, part in sides.items()}
    sizes = ran.get("data", {}).get("sizes") or {}
    how = ", quantised to int8" if options.quantize else ""
    return (
        _environment()
        .get_template("card.md.j2")
        .render(
            front=_front(given, options, main, found["student"], _data(given)),
            name=given.config["name"],
            what=f"The student of a run of kd, exported as {options.form}{how}.",
            data=_data(given),
            title=main.title,
            rows=[_row(side, part, found[side]) for side, part in sides.items() if part],
            retention=_retention(main, found),
            files=made.files,
            texts=given.tokenizer is not None,
            loads=_loads(given, options, about),
            compared=made.compared,
            compared_file=f"`{MODEL_FILES.get(options.form, 'model.safetensors')}`",
            difference=f"{made.difference:.2g}",
            allowed=f"{made.allowed:.2g}",
            int8=[(name, f"{value:.4f}") for name, value in made.accuracy.items()],
            version=ran.get("versions", {}).get("kd", ""),
            loss=", ".join(
                f"{name} × {node.get('weight', 1):g}" for name, node in given.config["loss"].items() if node
            ),
            seed=given.config["seed"],
            sizes="/".join(str(sizes.get(part)) for part in ("train", "val", "test")) + " samples of train/val/test",
            which="that validation selected" if split == "selected" else "of the last epoch",
        )
    )


def _data(given: Student) -> str:
    """Name the data: its title, the name on the hub, or the class that reads it."""
    section = given.config["data"]
    train = section.get("train")
    named = train.get("name") if isinstance(train, Mapping) else None
    return str(section.get("title") or named or str(section["_target_"]).rpartition(".")[2])


def _front(given: Student, options: Options, main: Metric, value: float | None, data: str) -> str:
    """Write the fields that the Hugging Face hub reads; what is not known, as the licence, is left out."""
    task = "image-segmentation" if given.answers == "mask" else HUB_TASKS[given.task.architecture]
    train = given.config["data"].get("train")
    metric = main.hub or main.name
    fields: dict[str, Any] = {
        **({"library_name": LIBRARIES[options.form]} if options.form in LIBRARIES else {}),
        "pipeline_tag": task,
        "tags": ["knowledge-distillation", options.form],
        **({"datasets": [train["name"]]} if isinstance(train, Mapping) and train.get("name") else {}),
        "metrics": [metric],
    }
    if value is not None:
        result = {
            "task": {"type": task},
            "dataset": {"name": data, "type": data.lower().replace(" ", "-"), "split": "test"},
            "metrics": [{"type": metric, "name": main.title, "value": round(value, 6)}],
        }
        fields["model-index"] = [{"name": given.config["name"], "results": [result]}]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip()


def _row(side: str, part: Mapping[str, Any], value: float | None) -> list[str]:
    counts = [f"{part[key]:,}" if key in part else "" for key in ("parameters", "macs")]
    return [side, "" if value is None else f"{value:.4f}", *counts]


def _retention(main: Metric, found: Mapping[str, float | None]) -> str:
    ratio = retention(found["student"], found["teacher"])
    if ratio is None:
        return "It was trained without a teacher that could be measured beside it."
    share = f"{ratio:.1%} of" if main.better == "max" else f"{ratio:.3f} times"
    return f"Retention: {share} the teacher's {main.title}."


def _loads(given: Student, options: Options, about: Mapping[str, Any]) -> str:
    """Tell how the folder is loaded."""
    own = {
        "safetensors": '`safetensors.torch.load_file("model.safetensors")` is the state dict; `network.json`, where '
        "there is one, names what makes the network.",
        "timm": '`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.',
        "hf": "`from_pretrained(FOLDER)` of transformers loads network and tokenizer.",
        "onnx": "`run_onnx.py` runs it with onnxruntime alone.",
        "torch-export": '`torch.export.load("model.pt2").module()` loads it, without the code of the network.',
    }[options.form]
    own += f" Sentences are pooled by {about['pooling']}." if about.get("pooling") else ""
    if options.form not in ("onnx", "torch-export"):
        return own
    inputs = (
        PIXELS.format(*about["shape"]) if given.images else IDS.format(", ".join(f"`{n}`" for n in about["inputs"]))
    )
    return own if given.tokenizer is None and not given.images else f"{own} {inputs}"
