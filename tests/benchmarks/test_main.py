"""The front door: every command has help, and a bad option is named."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.__main__ import COMMANDS, DEFAULT, main, module_of

BAD: list[tuple[list[str], str]] = [
    (["throughput", "--models", "alexnet"], "alexnet"),
    (["throughput", "--dtypes", "int8"], "int8"),
    (["overhead", "--models", "lenet,vgg"], "vgg"),
    (["--device", "quantum"], "quantum"),
    (["nonsense"], "nonsense"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD)
def test_bad_options_are_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert named in f"{raised.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([*arguments, "--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--quick", "--device", "--out"))


def test_a_folder_may_have_a_parts_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a part, those that run have their options at their defaults, whatever else is said."""
    ran: list[Any] = []
    for name in DEFAULT:
        monkeypatch.setattr(module_of(name), "run", ran.append)
    assert main(["--quick", "--out", "targets"]) == 0
    assert len(ran) == len(DEFAULT)
    assert all((each.threads, each.seed, each.quick, str(each.out)) == (1, 0, True, "targets") for each in ran)
