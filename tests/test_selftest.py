"""`python -m fused_sam selftest` finds a wrong primitive of a backend, and says in one line what it could not test."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_sam import __main__, backends
from fused_sam.backends import Foreach
from fused_sam.backends.contract import RULES
from fused_sam.engine.base_optimizers import FUSED
from fused_sam.testing import Report, checks, selftest
from fused_sam.testing.report import Result
from fused_sam.testing.tables import KINDS


class _Wrong(Foreach):
    """Foreach, of which a test breaks one primitive."""

    name = "wrong"


def off_norm(self: Any, table: Any, groups: Any, status: Any) -> None:
    """Lose the first tensor of a table."""
    Foreach.accumulate_norm(self, table, groups, status)
    status.sum_of_squares.sub_(table.grads[0].double().square().sum() + 1)


def off_perturb(self: Any, table: Any, groups: Any, status: Any) -> None:
    """Perturb the last element by 0.1% too much."""
    Foreach.perturb(self, table, groups, status)
    table.params[0].detach().view(-1)[-1].mul_(1.001).add_(0.01)


def no_backup(self: Any, table: Any, groups: Any, status: Any) -> None:
    Foreach.perturb(self, table, groups, status)
    for column in (table.backups, table.masters):
        for t in column[:1]:
            t.add_(1)


def no_restore(self: Any, table: Any) -> None:
    table.params[1].add_(0)


def off_squares(self: Any, table: Any, groups: Any, sums: Any, *, weights: bool) -> None:
    Foreach.squares(self, table, groups, sums, weights=weights)
    sums[1, -1] *= 1.001


def off_update(self: Any, table: Any, groups: Any, status: Any, grad_scale: Any, max_norm: float) -> None:
    Foreach.update(self, table, [group._replace(lr=group.lr * 1.01) for group in groups], status, grad_scale, max_norm)


def no_skip(self: Any, table: Any, groups: Any, status: Any, grad_scale: Any, max_norm: float) -> None:
    status.values[3] = 0
    Foreach.update(self, table, groups, status, grad_scale, max_norm)


def no_clipping(self: Any, table: Any, groups: Any, status: Any, grad_scale: Any, max_norm: float) -> None:
    Foreach.update(self, table, groups, status, grad_scale, math.inf)


def off_dot(self: Any, pair: Any, sums: Tensor, *, reset: bool) -> None:
    Foreach.dot(self, pair, sums, reset=False)


def off_axpby(self: Any, pair: Any, out: Any, coefficients: Any, status: Any = None) -> None:
    Foreach.axpby(self, pair, out, (1.0, 1.0), status)


def off_ema(self: Any, pair: Any, decay: float, status: Any = None) -> None:
    Foreach.ema(self, pair, decay - 0.01, status)


def raises(self: Any, *_: Any, **__: Any) -> None:
    raise OSError("no such\nkernel")


# The primitive, what takes its place, and the subjects that must differ.
WRONG: dict[str, tuple[str, Callable[..., Any], set[str]]] = {
    "norm": ("accumulate_norm", off_norm, {"norm"}),
    "squares": ("squares", off_squares, {"squares"}),
    "perturb": ("perturb", off_perturb, {"perturb"}),
    "backup": ("perturb", no_backup, {"perturb", "restore"}),
    "restore": ("restore", no_restore, {"restore"}),
    "update": ("update", off_update, {"update sgd", "update adam", "update lion", "steps of SGD", "steps of AdamW"}),
    "skip": ("update", no_skip, {"update sgd", "update adam", "update lion"}),
    "clipping": ("update", no_clipping, {"update sgd", "update adam", "steps of SGD"}),
    "dot": ("dot", off_dot, {"vectors"}),
    "axpby": ("axpby", off_axpby, {"vectors"}),
    "ema": ("ema", off_ema, {"vectors"}),
    "error": ("ema", raises, {"vectors"}),
}


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> type[_Wrong]:
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "wrong": _Wrong})
    return _Wrong


@pytest.mark.parametrize("name", [name for name in backends.BACKENDS if name != "reference"])
def test_the_backends_of_this_machine_pass(name: str) -> None:
    reason = backends.BACKENDS[name].unavailable_reason()
    if reason:
        pytest.skip(reason)
    report = selftest(name, rates=False)
    assert report.ok and not report.differences, report.text()
    subjects = {result.subject for result in report.results}
    assert {"norm", "squares", "perturb", "restore", "vectors", *(f"update {rule.name}" for rule in RULES)} <= subjects
    assert {f"steps of {base}" for base in checks.BASES} <= subjects


def test_every_fused_base_and_kind_is_checked(wrong: type[_Wrong]) -> None:
    assert {cls.__name__ for fused in FUSED for cls in fused.classes} <= checks.BASES.keys()
    found = list(checks.checks(wrong(), torch.device("cpu")))
    assert {dtypes for subject, dtypes, _ in found if subject == "update adam"} == {str(kind) for kind in KINDS}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_primitive_is_found(wrong: type[_Wrong], monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    primitive, function, subjects = WRONG[case]
    monkeypatch.setattr(wrong, primitive, function, raising=False)
    monkeypatch.setattr(checks, "KINDS", [KINDS[0], KINDS[6]])  # fp32, and bf16 with masters
    report = selftest("wrong", rates=False)
    differing = {result.subject for result in report.differences}
    assert subjects <= differing and not report.ok
    assert not differing & {"norm", "vectors"} - subjects
    if case == "error":
        assert "OSError: no such kernel" in report.text()


# ---- the command ----------------------------------------------------------------------------------------------------


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave one dtype and one base to check, and no rates."""
    monkeypatch.setattr(checks, "KINDS", KINDS[:1])
    monkeypatch.setattr(checks, "BASES", dict([*checks.BASES.items()][:1]))
    monkeypatch.setattr("fused_sam.testing.run.step_rate", lambda *_: 12.34)


def test_the_table_and_the_exit_code(
    wrong: type[_Wrong], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch)
    assert __main__.main(["selftest", "--backend", "wrong"]) == 0
    out = capsys.readouterr().out
    assert "wrong on cpu" in out and "12.3" in out and "checks agree" in out
    monkeypatch.setattr(wrong, "restore", no_restore)
    assert __main__.main(["selftest", "--backend", "wrong"]) == 1
    out = capsys.readouterr().out
    assert "1 of 1 DIFFER" in out
    assert "DIFFERS: wrong on cpu, restore, float32-float32: the params are not those before the perturbation" in out


def test_json(wrong: type[_Wrong], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few(monkeypatch)
    monkeypatch.setattr(wrong, "ema", off_ema)
    assert __main__.main(["selftest", "--backend", "wrong", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and found["rates"] == [{"backend": "wrong", "device": "cpu", "gb_per_second": 12.34}]
    assert any("ema" in check["message"] for check in found["checks"] if check["subject"] == "vectors")


def test_misuse_is_one_line_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends.BACKENDS["cuda"], "unavailable_reason", classmethod(lambda cls: "torch sees no\nGPU"))
    for name, message in (
        ("bogus", "unknown backend 'bogus'; there are 'foreach', 'cpu', 'cuda', 'triton'"),
        ("reference", "'reference' is what the other backends are compared with"),
        ("cuda", "backend 'cuda' cannot run here: torch sees no GPU"),
    ):
        assert __main__.main(["selftest", "--backend", name]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(message) and captured.err.count("\n") == 1 and not captured.out
    for arguments in (["selftest", "--bogus"], ["info", "--json"], ["selftest", "more"]):
        with pytest.raises(SystemExit) as stopped:
            __main__.main(arguments)
        assert stopped.value.code == 2 and arguments[1] in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_one_line(
    wrong: type[_Wrong], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch)
    only = {name: backends.BACKENDS[name] for name in ("reference", "wrong", "cuda")}
    monkeypatch.setattr(backends, "BACKENDS", only)
    monkeypatch.setattr(only["cuda"], "unavailable_reason", classmethod(lambda cls: "torch sees no GPU"))
    assert __main__.main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("not tested: cuda: torch sees no GPU") == 1


def test_the_plain_table_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report = Report([Result("a", "cpu", "norm", "x", ""), Result("a", "cuda", "norm", "x", "is 3"),
                     Result("b", "cpu", "dot", "y", "")], {("a", "cpu"): 20.0, ("b", "cpu"): None})  # fmt: skip
    report.show()
    assert capsys.readouterr().out.splitlines() == [
        "check         a on cpu  a on cuda      b on cpu",
        "norm          1 ok      1 of 1 DIFFER  -",
        "dot           -         -              1 ok",
        "a step, GB/s  20.0      -              -",
        "",
        "DIFFERS: a on cuda, norm, x: is 3",
        "1 of 3 checks differ from reference (0.0 s)",
    ]


def test_nothing_to_check_is_not_all_right() -> None:
    assert not Report().ok and "no backend can run here" in Report().text()


def test_it_runs_outside_of_the_tree(tmp_path: Any) -> None:
    """The package needs no test folder. One backend is enough here."""
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "from fused_sam.testing import selftest\n"
        "report = selftest('foreach')\n"
        "print(report.ok, report.rates['foreach', 'cpu'] > 0)"
    )
    root = str(__import__("pathlib").Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{program}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "True True\n", done.stderr
