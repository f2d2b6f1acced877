from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from interv.errors import SpecError, UsageError
from interv.plan import PatchPlan, make_patch_plan
from interv.plugins import load_plugin, load_plugins
from interv.spec import load_spec
from tests.conftest import Result, SpecWriter
from tests.test_patch_plan import ids, patch_spec

GOOD = """\
import interv

@interv.metric
def margin(logits, answers, wrong):
    return logits[:, answers[0]] - logits.mean(-1)

def helper():
    return 1
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str = GOOD, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def plan_of(path: Path, plugin: Path | None, *overrides: str) -> PatchPlan:
    return make_patch_plan(load_spec(path, overrides, plugin=plugin))


def test_a_file_holds_the_metrics_that_are_marked(plugin: Callable[..., Path]) -> None:
    path = plugin()
    found = load_plugin(path)
    assert list(found.metrics) == ["margin"]
    assert found.paths == (path,)
    assert len(found.sha256) == 64
    # Nothing is left beside the user's file.
    assert [p.name for p in path.parent.iterdir()] == ["mine.py"]


def test_what_runs_is_what_the_file_says_now(plugin: Callable[..., Path]) -> None:
    import os

    path = plugin(GOOD + "\nNUMBER = 1\n")
    first = load_plugin(path)
    stat = path.stat()
    plugin(GOOD.replace("margin", "nigram") + "\nNUMBER = 2\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = load_plugin(path)
    assert (list(first.metrics), list(second.metrics)) == (["margin"], ["nigram"])
    assert first.sha256 != second.sha256


def test_a_plugin_may_define_classes_and_have_any_name(plugin: Callable[..., Path]) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
    text += "@dataclass\nclass Pair:\n    a: int\n\n"
    assert list(load_plugin(plugin(text + GOOD, "a b.txt")).metrics)
    assert "interv_plugin_a b" in sys.modules
    del sys.modules["interv_plugin_a b"]


def test_objects_that_have_every_attribute_are_no_metrics(plugin: Callable[..., Path]) -> None:
    text = (
        "class Any:\n    def __getattr__(self, name):\n        return self\n    __call__ = print\n"
    )
    assert list(load_plugin(plugin(text + "anything = Any()\n" + GOOD)).metrics) == ["margin"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a file"),
        ("", "has no function marked @interv.metric"),
        ("def margin(): pass\n", "has no function marked @interv.metric"),
        ("1 / 0\n", "cannot be run: ZeroDivisionError: division by zero"),
        ("def (:\n", "cannot be run: SyntaxError"),
        ("import sys; sys.exit('no')\n", "cannot be run: SystemExit: no"),
        ("import nothing_of_the_kind\n", "cannot be run: ModuleNotFoundError"),
        ("x = '\0'\n", "cannot be run: "),
    ],
)
def test_files_that_are_no_plugins(
    text: str | None,
    message: str,
    plugin: Callable[..., Path],
    tmp_path: Path,
    write_spec: SpecWriter,
    cli: Callable[..., Result],
) -> None:
    path = tmp_path / "mine.py" if text is None else plugin(text)
    with pytest.raises(UsageError) as caught:
        load_plugin(path)
    assert f"--plugin {path}: {message}" in str(caught.value)
    result = cli("patch", patch_spec(write_spec), "--plugin", path, "--plan")
    assert (result.code, result.out) == (2, "")
    assert message in result.err and "Traceback" not in result.err


@pytest.mark.parametrize("command", ["patch", "plan", "data"])
def test_a_metric_of_a_plugin_on_the_command_line(
    command: str,
    plugin: Callable[..., Path],
    write_spec: SpecWriter,
    cli: Callable[..., Result],
) -> None:
    spec = patch_spec(write_spec, metric=["margin", "recovery:margin"])
    more = ["--plan"] if command == "patch" else []
    result = cli(command, spec, "--plugin", plugin(), *more)
    assert result.code == 0, result.err
    without = cli(command, spec, *more)
    assert without.code == 2
    assert "metric 'margin' is not known" in without.err
    assert "or one of a --plugin FILE" in without.err


def test_a_metric_that_the_plugin_does_not_have(
    plugin: Callable[..., Path], write_spec: SpecWriter
) -> None:
    for name, near in (("margn", "margin"), ("relative:margn", "relative:margin")):
        with pytest.raises(SpecError, match=f"metric '{name}' is not known") as caught:
            plan_of(patch_spec(write_spec, metric=name), plugin())
        [problem] = caught.value.problems
        assert problem.near == near
        assert problem.mark is not None and problem.mark.text == f"metric: {name}"


@pytest.mark.parametrize("name", ["logit", "top_3", "recovery"])
def test_a_metric_with_the_name_of_a_built_in_one(
    name: str, plugin: Callable[..., Path], write_spec: SpecWriter
) -> None:
    path = plugin(GOOD.replace("margin", name))
    with pytest.raises(SpecError, match=f"metric '{name}' of the plug-in has the name of a built"):
        plan_of(patch_spec(write_spec, metric=name), path)


def test_the_files_hash_is_in_the_ids_of_what_it_computes(
    plugin: Callable[..., Path], write_spec: SpecWriter
) -> None:
    one, two = plugin(GOOD, "one.py"), plugin(GOOD + "\n", "two.py")
    path = patch_spec(write_spec, metric="margin")
    assert ids(plan_of(path, one)) == ids(plan_of(path, plugin(GOOD, "same.py")))
    assert not ids(plan_of(path, one)) & ids(plan_of(path, two))
    assert plan_of(path, one).identity != plan_of(path, two).identity
    # Where none of its metrics is asked for, the values are as without it.
    assert ids(plan_of(path, one, "metric=logit")) == ids(plan_of(path, None, "metric=logit"))


def test_a_causal_model_uses_a_function_of_the_file(
    tmp_path: Path, cli: Callable[..., Result]
) -> None:
    plugin = tmp_path / "own.py"
    plugin.write_text(
        "import interv\n\n@interv.function\ndef both(a, b):\n    return (a & b).astype(int)\n"
    )
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        """
kind: train-das
model: {kind: mlp, hidden: [8], train: {examples: 4096, batch: 64, min_accuracy: 0.5}}
causal_model:
  variables:
    w: {vector: 2}
    x: {vector: 2, equal: w}
    y: {vector: 2}
    z: {vector: 2, equal: y}
    WX: w == x
    YZ: y == z
    O: "1 if both_of == 1 else 0"
    both_of: {function: both, of: [WX, YZ]}
  output: O
variables: WX
grid: {component: block_output}
"""
    )
    assert cli("plan", spec, "--plugin", plugin, "-o", tmp_path).code == 0
    without = cli("plan", spec, "-o", tmp_path)
    assert without.code == 2
    assert "both" in without.err


OTHER = """\
import interv

@interv.metric
def spread(logits, answers, wrong):
    return logits.std(-1)

@interv.function
def double(values):
    return 2 * values
"""


def test_every_plugin_that_is_named_is_read(
    plugin: Callable[..., Path], write_spec: SpecWriter, cli: Callable[..., Result]
) -> None:
    """`--plugin a.py --plugin b.py` dropped the first."""
    one, other = plugin(), plugin(OTHER, "other.py")
    path = patch_spec(write_spec, metric=["margin", "spread"])
    result = cli("validate", path, "--plugin", one, "--plugin", other)
    assert result.code == 0, result.err
    both, turned = (load_plugins(files) for files in ([one, other], [other, one]))
    assert set(both.metrics) == {"margin", "spread"}
    assert set(both.functions) == {"double"}
    assert both.sha256 == turned.sha256
    assert both.sha256 not in (load_plugins([one]).sha256, load_plugins([other]).sha256)
    assert load_plugins([one, one]).sha256 == load_plugin(one).sha256


def test_plugins_that_share_a_name_are_an_error(plugin: Callable[..., Path]) -> None:
    one, other = plugin(), plugin(GOOD + "\nNUMBER = 1\n", "other.py")
    with pytest.raises(UsageError, match=r"other\.py: 'margin' is in .*mine\.py too"):
        load_plugins([one, other])


@pytest.mark.parametrize("arguments", ["logits", "logits, answers", "a, b, c, d", "*, logits"])
def test_a_metric_of_another_signature_is_told_when_it_is_read(
    plugin: Callable[..., Path],
    write_spec: SpecWriter,
    cli: Callable[..., Result],
    arguments: str,
) -> None:
    """It was a TypeError's traceback after the model had been loaded."""
    path = plugin(GOOD.replace("logits, answers, wrong", arguments))
    result = cli("validate", patch_spec(write_spec, metric=["margin"]), "--plugin", path)
    assert result.code == 2
    assert f"{path}:3: the metric margin({arguments}) cannot be called as metrics are" in result.err
    assert "expected (logits, answers, wrong)" in result.err


@pytest.mark.parametrize("arguments", ["*logits", "a, b, c, d=1", "logits, answers, /, wrong"])
def test_a_metric_may_name_its_arguments_as_it_likes(
    plugin: Callable[..., Path], arguments: str
) -> None:
    assert load_plugin(plugin(GOOD.replace("logits, answers, wrong", arguments))).metrics
