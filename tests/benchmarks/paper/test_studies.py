"""The study of the meta-update: every way runs, results are kept, and the table says what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import apo
from apo import preconditioner
from benchmarks.__main__ import main
from benchmarks.paper.studies import command
from benchmarks.paper.studies.command import one_run
from benchmarks.paper.studies.start_from_moments import DAMPING, blocks_from_moments
from benchmarks.paper.studies.tables import markdown, summary
from benchmarks.paper.studies.variants import BASELINES, VARIANTS, Variant
from benchmarks.paper.tasks import Batches, named
from benchmarks.paper.training.training import Setting


def held(*losses: float) -> dict[str, list[float]]:
    return {"steps": [1.0] * len(losses), "losses": list(losses), "seconds": [2.0] * len(losses)}


def test_the_table_takes_the_better_finalist_and_counts_what_diverged() -> None:
    runs: dict[str, Any] = {
        "t/KFAC/0/lr=1": held(9, 0.1),
        "t/KFAC/1/lr=1": held(float("nan")),
        "t/KFAC/2/lr=1": held(float("nan")),
        "t/KFAC/0/lr=2": held(0.2),
        "t/KFAC/1/lr=2": held(0.4),
        "t/KFAC/2/lr=2": held(0.3),
        "t/KFAC/0/lr=3": held(0.11),  # not among the finalists
        "t/default/0": held(0.5),
    }
    assert summary(runs) == {"KFAC": {"t": (0.3, 0.2, 0.4, 3)}, "default": {"t": (0.5, 0.5, 0.5, 1)}}
    assert "| 0.300 (0.200 to 0.400; 3) | 2.0 |" in markdown(runs)


def test_grids_are_equal() -> None:
    assert len({len(baseline.grid) for baseline in BASELINES.values()}) == 1


def test_names_can_be_given_by_comma() -> None:
    assert not [name for name in (*VARIANTS, *BASELINES) if "," in name]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_learns(name: str) -> None:
    found = one_run("diabetes", name, None, seed=0, quick=True)
    assert found["losses"][-1] < found["losses"][0]


def test_runs_are_kept_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["studies", "--quick", "--out", str(tmp_path), "--study-tasks", "diabetes", "--seeds", "1"]
    arguments += ["--variants", "P fixed", "--against", "none"]
    assert main(arguments) == 0
    runs = json.loads((tmp_path / "meta-update.json").read_text())["runs"]
    assert list(runs) == ["diabetes/P fixed/0"]
    monkeypatch.setattr(command, "one_run", lambda *a, **k: pytest.fail("was run again"))
    assert main(arguments) == 0
    assert "P fixed" in (tmp_path / "meta-update.md").read_text()


def setting_of(name: str) -> Setting:
    task = named(name)
    return Setting(task, task.model(0), Batches(task.data().train, task.batch_size, 0))


def test_only_what_is_learned_moves() -> None:
    setting = setting_of("diabetes")
    optimizer = Variant("", {"interval": 1}, learned="AS").make(setting)
    assert isinstance(optimizer, apo.APO)
    before = {layer: [x.clone() for x in (layer.A, layer.B, layer.S)] for layer in optimizer.layers}
    for place in range(3):
        optimizer.step(closure_of(optimizer, setting, place))
    moved = {
        name: any(not torch.equal(own[i], getattr(layer, name)) for layer, own in before.items())
        for i, name in enumerate("ABS")
    }
    assert moved == {"A": True, "B": False, "S": True}


def test_the_meta_rate_decays_once_a_step() -> None:
    setting = setting_of("diabetes")
    optimizer = Variant("", {"interval": 2}, decay=0.5).make(setting)
    assert isinstance(optimizer, apo.APO)
    before = [own.rate for own in optimizer.meta.learned]
    for place in range(3):
        optimizer.step(closure_of(optimizer, setting, place))
    assert [own.rate for own in optimizer.meta.learned] == pytest.approx([rate / 8 for rate in before])


def test_the_same_batch_is_that_of_the_step() -> None:
    setting = setting_of("diabetes")
    inputs, _ = setting.batches.batch(3)
    assert setting.batches.latest is inputs


def test_moments_make_shampoo_of_the_first_step() -> None:
    """With blocks that aren't cut, P(G) ∝ (L + δI)^(−1/4) G (R + δI)^(−1/4), and as long as the gradients."""
    setting = setting_of("ill-conditioned")  # in float64
    objective = setting.task.objective(setting.model, setting.batches.other)
    optimizer = apo.APO(setting.model, objective, block_size=None)
    gradients = [gradients_of(optimizer, setting, place) for place in range(10)]
    blocks_from_moments(optimizer, setting)
    found = [preconditioner.apply(optimizer.layers, own) for own in gradients]
    length, other = (sum(float(x.square().sum()) for own in each for x in own) for each in (gradients, found))
    assert length == pytest.approx(other, rel=1e-9)
    for i in range(len(optimizer.layers)):
        Gs = torch.stack([own[i] for own in gradients])
        expected = root((Gs @ Gs.mT).mean(0)) @ Gs[0] @ root((Gs.mT @ Gs).mean(0))
        assert torch.nn.functional.cosine_similarity(expected.flatten(), found[0][i].flatten(), 0) > 1 - 1e-9


def root(H: Tensor) -> Tensor:
    values, Q = torch.linalg.eigh(H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype))
    return (Q * values.pow(-0.25)) @ Q.T


def gradients_of(optimizer: apo.APO, setting: Setting, place: int) -> list[Tensor]:
    closure_of(optimizer, setting, place)()
    return [p.grad.clone() for p in setting.model.parameters() if p.grad is not None]  # no layer of it has a bias


def closure_of(optimizer: apo.APO, setting: Setting, place: int) -> Callable[[], Tensor]:
    inputs, targets = setting.batches.batch(place)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = setting.task.loss_of(setting.model, inputs, targets)
        loss.backward()
        return loss

    return closure
