"""No result of the kernels depends on the caller's autocast, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest

from tests.apo_kernels.test_autocast import FORMS, check_bound_model, check_functions, check_relative_steps

pytest.importorskip("triton.language")

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("form", FORMS[1:3])
def test_functions(form: Any) -> None:
    check_functions(form, "triton")


def test_relative_steps() -> None:
    check_relative_steps("triton")


@pytest.mark.parametrize("n", [10, 70])
def test_a_bound_model(n: int) -> None:
    """The wider one's slopes take torch's products too."""
    check_bound_model(n, "triton")
