"""Which path serves, who may say so, and what the package needs to be imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import apo_kernels as ak
from apo_kernels import dispatch
from apo_kernels.dispatch import ENVIRONMENT_VARIABLE
from tests.apo_kernels.cases import make


def test_explain_names_the_path_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "requested", None)
    assert ak.explain().startswith("aten: ")
    assert "argument" in ak.explain("aten")
    monkeypatch.setattr(dispatch, "requested", "aten")
    assert ENVIRONMENT_VARIABLE in ak.explain()


def test_unknown_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "requested", "fortran")
    with pytest.raises(ValueError, match=r"^APO_KERNELS_BACKEND must be None or one of .*, but got 'fortran'"):
        ak.precondition(*make(3, 4).operands)


def test_the_argument_outranks_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "requested", "fortran")
    layer = make(3, 4)
    torch.testing.assert_close(ak.precondition(*layer.operands, backend="aten"), layer.forward())


def test_the_environment_is_read_at_import() -> None:
    code = "import apo_kernels as ak; assert 'asked for by APO_KERNELS_BACKEND' in ak.explain()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, ENVIRONMENT_VARIABLE: "aten"})


def test_imports_and_runs_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, apo_kernels as ak\n"
        "G = torch.randn(3, 4)\n"
        "Y = ak.precondition(G, torch.eye(4), torch.eye(3), torch.ones(3, 4))\n"
        "assert torch.equal(Y, G)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_backend_reaches_no_front_end() -> None:
    """One way only: importing the backend loads neither apo nor benchmarks."""
    code = "import sys, apo_kernels; assert not {'apo', 'benchmarks'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
