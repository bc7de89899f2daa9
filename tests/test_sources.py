"""Which own code a target runs, read from files, and when it is other code."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from kd.config.compose import checked
from kd.errors import KdError
from kd.records import inputs, record, sources
from kd.run.train import resume

DKD = '''"""A method."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

import distances
from terms.base import *


class DKD(nn.Module):
    """Take a scale."""

    def __init__(self, scale=1.0, name="a"):
        self.scale = scale

    def forward(self, student, teacher, batch):
        from terms import late  # only when it is needed

        return distances.squared(student.logits, teacher.logits).mean()
'''
FILES = {
    "dkd.py": DKD,
    "distances.py": "def squared(a, b):\n    return (a - b) ** 2\n",
    "unrelated.py": "",
    "terms/__init__.py": "from . import registry\n",
    "terms/registry.py": "from .. import beyond\nfrom .deep.er import x\n",
    "terms/base.py": "import dkd\nimport not_there\n",
    "terms/late.py": "",
    "terms/deep/er.py": "import kd.records.record, sklearn.svm\nx = 1\n",  # deep/ has no __init__.py
    "terms/unused.py": "",
}
MODULES = ["distances", "dkd", "terms", "terms.base", "terms.deep.er", "terms.late", "terms.registry"]
CONFIG = ["loss=[ce]", "+loss.dkd={_target_: dkd.DKD, weight: 1}", "teacher.allow_random=true"]
NAMED = "_target_ = dkd.DKD is other code than when the run began (changed: "


def project(folder: Path) -> Path:
    """A folder with the modules of a method."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, as working directory and on the path."""
    monkeypatch.chdir(project(tmp_path / "project"))
    monkeypatch.syspath_prepend(Path.cwd())
    return Path.cwd()


def replace(file: str, old: str, new: str) -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))


def ran() -> dict[str, object]:
    """A record of a run of now."""
    return json.loads(json.dumps({"code_read": sources.read_by(checked(CONFIG))}))


# ---------------------------------------------------------------------- what is read


def test_imports_are_followed_to_all_own_modules_without_importing(own: Path) -> None:
    before = set(sys.modules)  # another test of this process may have trained with them
    found = ran()["code_read"]
    assert list(found) == ["dkd.DKD"]
    assert list(found["dkd.DKD"]) == MODULES
    assert all(len(digest) == 12 for digest in found["dkd.DKD"].values())
    assert not {"dkd", "distances", "terms"} & (sys.modules.keys() - before)


def test_what_is_installed_or_kd_is_no_own_code(own: Path) -> None:
    for target in (
        "kd.losses.logits.ce.CrossEntropy",
        "torch.optim.SGD",
        "timm.create_model",
        "os.path.join",
        "math.sqrt",
    ):
        assert sources.code_of(target) == {}, target
    assert sources.code_of("nowhere.X") is None
    assert sources.read_by(checked(["loss=[ce]"])) == {}


def test_a_section_that_changes_no_result_is_left_out(own: Path) -> None:
    logger = ["+logger.mine={_target_: distances.squared, a: 1, b: 2}"]
    assert list(sources.read_by(checked([*CONFIG, *logger]))) == ["dkd.DKD"]
    assert list(sources.read_by({"logger": {"_target_": "dkd.DKD"}, "data": [{"_target_": "distances.squared"}]})) == [
        "distances.squared"
    ]


def test_the_network_of_a_teacher_comes_with_its_weights(own: Path) -> None:
    def read(about: str, model: str | None = None) -> list[str]:
        save_file({"a": torch.zeros(1)}, own / "teacher.safetensors", metadata={"kd": about})
        teacher = {"checkpoint": str(own / "teacher.safetensors"), "model": model and {"_target_": model}}
        return list(inputs.read_by({"student": {"checkpoint": None}, "teacher": teacher})["code_read"])

    assert read('{"model": {"_target_": "dkd.DKD", "inner": {"_target_": "distances.squared"}}}') == [
        "distances.squared",
        "dkd.DKD",
    ]
    assert read('{"model": {"_target_": "dkd.DKD"}}', "distances.squared") == ["distances.squared"]
    for about in ("{}", "[]", "no JSON", '{"model": 3}', "[" * 9999, '{"model": ' + "[" * 930 + "]" * 930 + "}"):
        assert read(about) == []
    assert inputs.read_by(checked(["teacher.checkpoint=nowhere"]))["code_read"] == {}


def test_where_own_code_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is linked to is own code; a file that an installer links to its cache is not."""
    installed = tmp_path / "lib" / "site-packages"
    for folder in (
        tmp_path / "cache",
        installed / "packaged",
        tmp_path / "work" / "linked",
        tmp_path / "work" / "pathed",
    ):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    (installed / "packaged" / "cached.py").symlink_to(tmp_path / "cache" / "__init__.py")
    (installed / "linked").symlink_to(tmp_path / "work" / "linked")
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.writestr("in_zip.py", "class X: pass\n")
    for path in (installed, tmp_path / "work", tmp_path / "zipped.zip"):
        monkeypatch.syspath_prepend(path)
    found = {
        name: sources.code_of(name) for name in ("packaged.X", "packaged.cached.X", "linked.X", "pathed.X", "in_zip.X")
    }
    assert {name: list(code or ()) for name, code in found.items()} == {
        "packaged.X": [],
        "packaged.cached.X": [],
        "linked.X": ["linked"],
        "pathed.X": ["pathed"],
        "in_zip.X": ["in_zip"],
    }
    assert found["in_zip.X"] == {"in_zip": None}, "what cannot be read is said, and is not compared"
    assert sources.changed({"code_read": {"in_zip.X": {"in_zip": "0" * 12}}}) == ""


# ---------------------------------------------------------------------- what is other code


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("dkd.py", ".mean()", ".mean() * 0.01"),
        ("dkd.py", "scale=1.0", "scale=1"),
        ("dkd.py", '"a"', '"# a"'),
        ("distances.py", "** 2", "** 4"),
        ("terms/__init__.py", "registry", "registry, base"),
        ("terms/deep/er.py", "x = 1", "x = 2"),
    ],
)
def test_a_change_names_the_target_and_the_file(own: Path, file: str, old: str, new: str) -> None:
    before = ran()
    assert sources.changed(before) == ""
    replace(file, old, new)
    assert sources.changed(before) == f"{NAMED}{file})"
    replace(file, new, old)
    assert sources.changed(before) == ""


def test_modules_that_come_and_go_are_named(own: Path) -> None:
    before = ran()
    Path("not_there.py").write_text("")  # base.py imports it if it can
    assert sources.changed(before) == f"{NAMED}not_there.py)"
    Path("not_there.py").unlink()
    Path("distances.py").unlink()
    assert sources.changed(before) == f"{NAMED}distances)"
    replace("dkd.py", "import distances\n", "")
    assert sources.changed(before) == f"{NAMED}distances, dkd.py)"


def test_comments_docstrings_layout_and_what_is_not_imported_do_not_count(own: Path) -> None:
    before = ran()
    replace("dkd.py", '"""A method."""\n', '"""Another text.\n\nOn three lines.\n"""\n\n# a comment\n')
    replace("dkd.py", '"""Take a scale."""', "...")
    replace(
        "dkd.py",
        '(self, scale=1.0, name="a")',
        "(\n        self,\n        scale=1.0,  # as in the paper\n        name='a',\n    )",
    )
    Path("unrelated.py").write_text("x = 1\n")
    Path("terms/unused.py").write_text("x = 1\n")
    assert sources.changed(before) == ""


def test_the_same_files_in_another_folder_are_the_same(own: Path, tmp_path: Path, monkeypatch) -> None:
    before = ran()
    moved = project(tmp_path / "elsewhere")
    shutil.rmtree(own)
    monkeypatch.chdir(moved)
    assert sources.changed(before) == "", "it is nowhere: not known"
    monkeypatch.syspath_prepend(moved)
    assert ran() == before
    replace("dkd.py", ".mean()", ".sum()")
    monkeypatch.chdir(tmp_path)
    assert sources.changed(before) == f"{NAMED}{os.path.join('elsewhere', 'dkd.py')})"


def test_code_that_does_not_parse_counts_by_its_bytes(own: Path) -> None:
    Path("distances.py").write_text("def squared(a, b\n")
    before = ran()
    assert sources.changed(before) == ""
    Path("distances.py").write_bytes(b"\xff\x00")
    assert sources.changed(before) == f"{NAMED}distances.py)"


def test_what_a_record_does_not_know_is_not_outdated(own: Path) -> None:
    for known in ({}, {"code_read": None}, {"code_read": {}}, {"code_read": {"dkd.DKD": None}}, {"code_read": [1]}):
        assert sources.changed(known) == ""
        assert sources.fingerprint(known, ["dkd.DKD"]) == "" or known["code_read"]
        assert sources.mixed([known, {"code_read": {}}]) == []
    assert sources.changed({"code_read": {"nowhere.X": {"nowhere": "0" * 12}}}) == ""
    assert sources.changed({"code_read": {"torch.optim.SGD": {"torch": "0" * 12}}}) == "", "it was installed since"


def test_the_digest_is_one_for_all_versions_of_python(own: Path) -> None:
    """``ast.dump`` gives another text in 3.12 and in 3.13."""
    text = (
        "@f(x=1)\nasync def g(a, /, b: int = 0, *c, d=None, **e) -> None:\n    'doc'\n    return f'{a!r:>3}' + u'é'\n"
    )
    text += "class A(B, metaclass=C):\n    y: dict = {**z, 1: -2.5e-3j}\n    def h(self): ...\n"
    text += "match v:\n    case [1, *_] | None if x := (lambda: 0)():\n        del q[1:, ...]\n"
    Path("distances.py").write_text(text)
    assert sources.code_of("distances.A") == {"distances": "0a44e4f9ec83"}


def test_deep_code_does_not_count_by_who_calls(own: Path) -> None:
    Path("distances.py").write_text("if a:\n    pass\n" + "elif a:\n    pass\n" * 200)
    before = sources.code_of("distances.X")
    with open("distances.py", "a") as file:
        file.write("# a comment\n")

    def deeper(levels: int) -> object:
        return deeper(levels - 1) if levels else sources.code_of("distances.X")

    assert deeper(sys.getrecursionlimit() // 2) == before


# ---------------------------------------------------------------------- resuming


def test_a_run_does_not_go_on_with_other_code(own: Path) -> None:
    run_dir = own / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "last.ckpt").write_bytes(b"")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(checked(CONFIG)))
    record.write(run_dir, {"schema": 1, "status": "interrupted", "overrides": CONFIG, **ran()})
    replace("distances.py", "** 2", "** 4")
    with pytest.raises(KdError) as raised:
        resume(run_dir)
    assert str(raised.value) == f"resume={run_dir}: {NAMED}distances.py); a run goes on as it began"
    assert not (run_dir / "train.log").exists()
