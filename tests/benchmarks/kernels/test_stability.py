"""The stability study: its matrices, its methods and what it counts as broken."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import results
from benchmarks.common.fisher.damping import tikhonov
from benchmarks.kernels.stability.aggregate import broken_share, median_error, saved_from, within_reach
from benchmarks.kernels.stability.command import add_arguments, measure_all, run
from benchmarks.kernels.stability.measure import DTYPES, LIMIT, Counts, Measured, count_range, limit, measure
from benchmarks.kernels.stability.methods import METHODS, InverseMethod, StoredOperands, Trace
from benchmarks.kernels.stability.plots import plot
from benchmarks.kernels.stability.problem import Damped, LayerFactors
from benchmarks.kernels.stability.recording import NETS, Recorder, record
from benchmarks.kernels.stability.synthetic import synthetic_case
from benchmarks.kernels.stability.tables import tables

BY_KEY = {method.key: method for method in METHODS}
EACH_METHOD = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
LOW = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_method(result: Callable[[StoredOperands], Tensor]) -> InverseMethod:
    """A method that is given factors and answers with ``result``."""
    return InverseMethod("fake", "fake", BY_KEY["inverse"].prepare, lambda x: Trace(result(x), {}))


class TestMethods:
    @EACH_METHOD
    @pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
    def test_float64_is_the_dense_kronecker_inverse(self, method: InverseMethod, damping: float) -> None:
        case = synthetic_case(1e3, m=4, n=6)
        mean_A, mean_B = case.F_A.trace() / 6, case.F_B.trace() / 4
        shift_A = (mean_A / mean_B).sqrt() * math.sqrt(damping)
        shift_B = (mean_B / mean_A).sqrt() * math.sqrt(damping)
        shifted_A = case.F_A + shift_A * torch.eye(6, dtype=torch.float64)
        shifted_B = case.F_B + shift_B * torch.eye(4, dtype=torch.float64)
        fisher = torch.kron(shifted_A, shifted_B)
        vec = case.G.T.reshape(-1)  # columns one under the other
        expected = torch.linalg.solve(fisher, vec).reshape(6, 4).T

        problem = Damped(case, damping)
        result = method.apply(method.prepare(problem)).result

        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())
        torch.testing.assert_close(problem.result, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())

    @EACH_METHOD
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_works_in_the_dtype_of_its_operands(self, method: InverseMethod, dtype: torch.dtype) -> None:
        problem = Damped(synthetic_case(1e2, m=8, n=5), 1e-2)
        trace = method.apply(method.prepare(problem).to(dtype))
        assert trace.result.dtype == dtype
        assert all(x.dtype == dtype for x in trace.intermediates.values())
        error = (trace.result.double() - problem.result).norm() / problem.result.norm()
        assert error < 50 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", LOW, ids=str)
    def test_balanced_blocks_are_the_same_preconditioner(self, dtype: torch.dtype) -> None:
        problem = Damped(synthetic_case(1e3, m=8, n=5), 1e-4)
        plain, balanced = (BY_KEY[key].prepare(problem) for key in ("ours", "ours_balanced"))
        A, B, S = (balanced.held[name] for name in "ABS")
        assert 0.5 <= S.max() / torch.linalg.matrix_norm(A, 2) <= 2
        torch.testing.assert_close(torch.linalg.matrix_norm(A, 2), torch.linalg.matrix_norm(B, 2))
        # Powers of two change no rounding as long as nothing leaves the range.
        results = [BY_KEY["ours"].apply(operands.to(dtype)).result for operands in (plain, balanced)]
        torch.testing.assert_close(*results, rtol=0, atol=0)

    def test_negative_eigenvalues_count_as_zero(self) -> None:
        F_A = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
        operands = StoredOperands(
            torch.ones(1, 2, dtype=torch.float64), {"F_A": F_A, "F_B": torch.ones(1, 1).double()}, 0.25, 0.0
        )
        result = BY_KEY["eigen"].apply(operands).result
        torch.testing.assert_close(result, torch.tensor([[1 / 1.25, 1 / 0.25]], dtype=torch.float64))


class TestProblem:
    def test_damping_is_balanced_between_the_factors(self) -> None:
        delta_A, delta_B = tikhonov(torch.eye(3) * 9, torch.eye(2), 0.04)
        assert (delta_A, delta_B) == pytest.approx((0.6, 0.2 / 3))
        assert tikhonov(torch.zeros(3, 3), torch.eye(2), 0.04) == pytest.approx((0.2, 0.2))

    def test_no_damping_needs_regular_factors(self) -> None:
        case = synthetic_case(1e2, m=3, n=3)
        singular = replace(case, F_A=torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)))
        assert singular.condition == math.inf
        Damped(case, 0.0)
        with pytest.raises(ValueError, match=r"damping must be positive .* singular; got 0"):
            Damped(singular, 0.0)


class TestSynthetic:
    @pytest.mark.parametrize("condition", [1.0, 1e2, 1e6, 1e10])
    def test_condition_number_is_the_one_asked_for(self, condition: float) -> None:
        F_A = synthetic_case(condition, m=9, n=30).F_A
        torch.testing.assert_close(F_A, F_A.T, rtol=0, atol=0)
        assert torch.linalg.cond(F_A).item() == pytest.approx(condition, rel=1e-4)
        values = torch.linalg.eigvalsh(F_A)
        spacing = values.log().diff()
        torch.testing.assert_close(spacing, spacing.mean().expand(29), rtol=1e-3, atol=1e-12)
        assert synthetic_case(condition, m=9, n=7).condition == pytest.approx(condition, rel=1e-4)

    def test_gradient_has_the_covariance_of_the_factors(self) -> None:
        """Whitened by both factors it is a matrix of unit variance."""
        case = synthetic_case(1e4, m=64, n=96)
        whitened = [(eigen.Q / eigen.values.sqrt()) @ eigen.Q.T for eigen in (case.eigen_B, case.eigen_A)]
        Z = whitened[0] @ case.G @ whitened[1]
        assert Z.std().item() == pytest.approx(1, abs=0.05)
        assert Z.mean().item() == pytest.approx(0, abs=0.05)

    def test_seeds_decide(self) -> None:
        first, again, other = (synthetic_case(1e3, m=4, n=5, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.G, again.G)
        assert not torch.equal(first.G, other.G)

    @pytest.mark.parametrize("condition", [0.5, math.inf, math.nan])
    def test_bad_condition_is_named(self, condition: float) -> None:
        with pytest.raises(ValueError, match="condition must be finite and at least 1"):
            synthetic_case(condition)


class TestRecording:
    def test_linear_layer_by_hand(self) -> None:
        layer = nn.Linear(5, 3).double()
        recorder = Recorder(nn.Sequential(layer))
        x, targets = normal(40, 5), torch.arange(40) % 3
        recorder.update(x, torch.Generator().manual_seed(7))

        p = layer(x).detach().softmax(-1)
        sampled = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(7)).squeeze(-1)
        Ds = p - F.one_hot(sampled, 3)
        a = torch.cat([x, torch.ones(40, 1)], 1)
        F_A, F_B = recorder.factors[recorder.layers[0]]
        torch.testing.assert_close(F_A, sum(torch.outer(v, v) for v in a) / 40)
        torch.testing.assert_close(F_B, sum(torch.outer(v, v) for v in Ds) / 40)
        F.cross_entropy(layer(x), targets).backward()
        G = recorder.layers[0].gradient()
        torch.testing.assert_close(G, (p - F.one_hot(targets, 3)).T @ a / 40)

    def test_convolution_patch_by_patch(self) -> None:
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 3, 3, padding=1, stride=2).double()
        model = nn.Sequential(conv, nn.Flatten())  # 3 channels of 2×2 positions: 12 classes
        recorder = Recorder(model)
        x = normal(6, 2, 4, 4)
        recorder.update(x, torch.Generator().manual_seed(7))

        p = model(x).detach().softmax(-1)
        sampled = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(7)).squeeze(-1)
        Ds = (p - F.one_hot(sampled, 12)).reshape(6, 3, 2, 2)
        padded = F.pad(x, (1, 1, 1, 1))
        F_A, F_B, G = torch.zeros(19, 19), torch.zeros(3, 3), torch.zeros(3, 19)
        for example in range(6):
            for i in range(2):
                for j in range(2):
                    patch = padded[example, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].reshape(-1)
                    a = torch.cat([patch, torch.ones(1)])
                    g = Ds[example, :, i, j]
                    F_A = F_A + torch.outer(a, a) / 6
                    F_B = F_B + torch.outer(g, g) / (6 * 4)
                    G = G + torch.outer(g, a) / 6
        torch.testing.assert_close(recorder.factors[recorder.layers[0]][0], F_A)
        torch.testing.assert_close(recorder.factors[recorder.layers[0]][1], F_B)
        F.cross_entropy(model(x), sampled).backward()
        torch.testing.assert_close(recorder.layers[0].gradient(), G)  # a's order is the weight's

    def test_targets_are_sampled_from_the_model(self) -> None:
        """With zero weights every class has p = ¼, and E[Ds Dsᵀ] = diag(p) − p pᵀ."""
        layer = nn.Linear(2, 4).double()
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        recorder = Recorder(nn.Sequential(layer))
        generator = torch.Generator().manual_seed(0)
        recorder.update(normal(20_000, 2), generator)
        expected = torch.eye(4).double() / 4 - 1 / 16
        torch.testing.assert_close(recorder.factors[recorder.layers[0]][1], expected, rtol=0, atol=5e-3)

    def test_averages(self) -> None:
        # 1/k for the first 20, then 0.95 to the power of the age
        weights = [1 / 20 * 0.95**20] * 20 + [0.05 * 0.95**age for age in reversed(range(20))]
        recorder = Recorder(nn.Sequential(nn.Linear(2, 3).double()))
        expected = torch.zeros(3, 3).double()
        for batch, weight in enumerate(weights):
            x = normal(4, 2, seed=batch)
            a = torch.cat([x, torch.ones(4, 1)], 1)
            recorder.update(x, torch.Generator().manual_seed(0))
            expected += weight * a.T @ a / 4
        assert sum(weights) == pytest.approx(1)
        torch.testing.assert_close(recorder.factors[recorder.layers[0]][0], expected)

    def test_recorded_cases_are_what_they_claim(self) -> None:
        before = torch.random.get_rng_state()
        cases, again = ([case for net in NETS for case in record(net, (1, 3))] for _ in range(2))
        assert torch.equal(before, torch.random.get_rng_state())
        assert [tuple(case.G.shape) for case in cases if "step 1" in case.name] == [
            (128, 65),
            (64, 129),
            (10, 65),
            (8, 10),
            (16, 73),
            (10, 257),
        ]
        assert len({case.name for case in cases}) == 12
        for case, same in zip(cases, again, strict=True):
            assert torch.equal(case.G, same.G)
            assert torch.equal(case.F_B, same.F_B)
            for matrix, eigen in ((case.F_A, case.eigen_A), (case.F_B, case.eigen_B)):
                torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-15)
                assert eigen.values[0] >= -1e-13 * eigen.values[-1]
                assert eigen.values[-1] > 0
        assert not torch.equal(cases[0].G, cases[3].G)  # it has trained


class TestMeasure:
    def test_rounding_to_an_indefinite_factor_is_a_breakdown_of_the_inverse_only(self) -> None:
        # bf16 has 1 and 1 + 2⁻⁷ and nothing between: 1.0117 goes down, 1.004 goes up.
        F_A = torch.tensor([[1.0, 1.004], [1.004, 1.0117]], dtype=torch.float64)
        assert torch.linalg.eigvalsh(F_A)[0] > 0
        assert torch.linalg.eigvalsh(F_A.bfloat16().double())[0] < 0
        G = torch.tensor([[1.0, 1.003]], dtype=torch.float64)
        case = LayerFactors("indefinite", "synthetic", G, F_A, torch.ones(1, 1, dtype=torch.float64))
        problem = Damped(case, 0.0)

        broken = measure(problem, BY_KEY["inverse"], torch.bfloat16)
        assert broken.breakdown == "Cholesky of F_A failed"
        assert broken.error is None
        assert broken.arithmetic is None  # float64 has no inverse of the rounded factor's either
        assert measure(problem, BY_KEY["inverse"], torch.float32).breakdown is None
        assert measure(Damped(case, 1e-2), BY_KEY["inverse"], torch.bfloat16).breakdown is None
        ours = measure(problem, BY_KEY["ours"], torch.bfloat16)
        assert ours.arithmetic is not None
        assert ours.arithmetic < 2**-8

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (lambda x: -x.G, "indefinite"),
            (lambda x: 0 * x.G, "indefinite"),
            (lambda x: x.G * math.nan, "not finite"),
            (lambda x: 2.1 * x.G, "error above 1"),
            (lambda x: 1.9 * x.G, None),
        ],
    )
    def test_reasons_of_breakdowns(self, answer: Callable[[StoredOperands], Tensor], reason: str | None) -> None:
        eye = torch.eye(4, dtype=torch.float64)
        problem = Damped(LayerFactors("identity", "synthetic", normal(4, 4), eye, eye), 0.0)  # P(G) = G
        assert measure(problem, as_method(answer), torch.float64).breakdown == reason

    @EACH_METHOD
    @pytest.mark.parametrize("dtype", LOW, ids=str)
    def test_errors_add_up(self, method: InverseMethod, dtype: torch.dtype) -> None:
        row = measure(Damped(synthetic_case(1e2, m=12, n=9), 1e-3), method, dtype)
        assert row.error is not None
        assert row.arithmetic is not None
        assert row.representation is not None
        assert row.error <= row.representation + row.arithmetic * (1 + row.representation) + 1e-12
        assert row.error >= row.representation - row.arithmetic * (1 + row.representation) - 1e-12

    def test_representation_alone(self) -> None:
        """A method that computes in float64 whatever it is given has one rounding for all its arithmetic."""
        problem = Damped(synthetic_case(1e3, m=12, n=9), 1e-4)
        exact = as_method(lambda x: problem.exact(x.G.double()).to(x.G.dtype))
        row = measure(problem, exact, torch.bfloat16)
        assert row.arithmetic is not None
        assert 2**-11 < row.arithmetic < 2**-8
        assert replace(row, method=LIMIT) == limit(problem, torch.bfloat16)

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
    @pytest.mark.parametrize("damping", [1e-8, 1e-4, 1e-1])
    def test_our_arithmetic_is_one_rounding(self, dtype: torch.dtype, bound: float, damping: float) -> None:
        row = measure(Damped(synthetic_case(1e6, m=24, n=40), damping), BY_KEY["ours_balanced"], dtype)
        assert row.arithmetic is not None
        assert row.arithmetic < bound

    def test_counts_of_range(self) -> None:
        exact = torch.tensor([1.0, 1e5, 1e-6, 1e-9, 0.0, 1e-25, math.inf], dtype=torch.float64)
        assert count_range(exact.half(), exact) == Counts(overflow=1, zero=1, subnormal=1)
        assert count_range(exact.bfloat16(), exact) == Counts()
        assert count_range(exact, exact) == Counts()
        assert count_range(exact.half(), None) == Counts(overflow=2)
        nan = torch.tensor([1.0, math.nan])
        assert count_range(nan, torch.ones(2, dtype=torch.float64)) == Counts(overflow=1)

    def test_a_square_that_overflows_is_seen(self) -> None:
        """S = 1000 fits into fp16 and its square doesn't: the chain's loss, and not ours."""
        eye = torch.eye(2, dtype=torch.float64)
        problem = Damped(LayerFactors("small", "synthetic", 1e-3 * (eye + 0.1), 1e-3 * eye, 1e-3 * eye), 0.0)
        chain = measure(problem, BY_KEY["chain"], torch.float16)
        assert chain.intermediates["S"] == Counts()
        assert chain.intermediates["S²"] == Counts(overflow=4)
        assert chain.breakdown == "not finite"
        assert measure(problem, BY_KEY["ours"], torch.float16).breakdown is None


def row(method: str, damping: float, error: float | None, breakdown: str | None = None, **kw: object) -> Measured:
    base = Measured("case", "recorded", 1e3, damping, method, "bf16", error, error, error, breakdown, 4, Counts(), {})
    return replace(base, **kw)  # type: ignore[arg-type]


class TestAggregates:
    def test_saved_from(self) -> None:
        broken = "not finite"
        rows = [row("ours", 1e-4, 0.1, broken), row("ours", 1e-2, 0.1), row("ours", 1.0, 0.1)]
        assert saved_from(rows) == 1e-2
        assert saved_from([*rows, row("ours", 1e-2, 0.1, broken, case="other")]) == 1.0
        assert saved_from([*rows, row("ours", 1.0, 0.1, broken, case="other")]) == math.inf

    def test_missing_errors_count_as_infinite(self) -> None:
        assert median_error([row("ours", 1.0, e) for e in (0.1, 0.2, None)]) == 0.2
        assert median_error([row("ours", 1.0, e) for e in (0.1, None, None)]) == math.inf
        assert math.isnan(median_error([]))
        assert broken_share([row("ours", 1.0, 2.0, "error above 1"), row("ours", 1.0, 0.1)]) == 0.5

    def test_only_what_breaks_the_limit_is_out_of_reach(self) -> None:
        lost = [row(LIMIT, 1e-4, 2.0, "error above 1"), row("ours", 1e-4, 2.0, "error above 1")]
        kept = [row(LIMIT, 1e-2, 0.1), row("ours", 1e-2, 2.0, "error above 1")]
        elsewhere = [row("ours", 1e-4, 2.0, "error above 1", dtype="fp16")]
        assert within_reach([*lost, *kept, *elsewhere]) == [*kept, *elsewhere]


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    assert plot([], tmp_path) == []


def options(out: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.set_defaults(quick=True, device="cpu", out=out)
    return parser.parse_args(arguments)


class TestRun:
    def test_end_to_end(self, tmp_path: Path) -> None:
        tiny = ["--moments", "1", "--conditions", "1e2", "1e8", "--dampings", "1e-8", "1e-2"]
        payload = run(options(tmp_path / "out", *tiny))

        written = results.load(tmp_path / "out" / "stability.json")
        assert written["benchmark"] == "stability"
        assert written["summary"] == results.plain(payload["summary"])
        problems = 6 * 2 + 2 * 3  # synthetic factors are taken without damping as well
        assert len(written["rows"]) == problems * len(DTYPES) * (1 + len(METHODS))
        errors = [r["error"] for r in written["rows"] if "error" in r]
        assert len(errors) > len(written["rows"]) / 2
        assert all(isinstance(error, float) and math.isfinite(error) for error in errors)
        assert all("breakdown" in r for r in written["rows"] if "error" not in r)
        pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
        assert pictures == ["stability-breakdowns.png", "stability-condition.png", "stability-damping.png"]
        for name in pictures:
            assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")

    def test_our_error_stays_at_the_limit_where_inversion_fails(self) -> None:
        rows = measure_all([synthetic_case(1e4, m=32, n=48)], [1e-6])
        undamped = {r.method: r for r in rows if r.damping == 0 and r.dtype == "bf16"}
        assert undamped["inverse"].breakdown is not None
        assert undamped["ours"].breakdown == undamped[LIMIT].breakdown
        assert undamped["ours"].error == pytest.approx(undamped[LIMIT].error, rel=0.2)
        assert all(table.row_count for table in tables(rows))

    @pytest.mark.parametrize("arguments", [("--dampings", "0", "1"), ("--moments", "0")], ids=str)
    def test_bad_options_are_refused(self, arguments: tuple[str, ...], tmp_path: Path) -> None:
        with pytest.raises(SystemExit):
            options(tmp_path, *arguments)
