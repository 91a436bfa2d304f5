"""No figure stands in README or docs that the results files don't hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import mean

import pytest

from benchmarks import readme
from benchmarks.common import results
from benchmarks.paper.overhead import AT_FIRST, BY_DEFAULT, FIRST_STEPS
from benchmarks.paper.peers import RATES
from benchmarks.paper.report import peers
from benchmarks.paper.studies.tables import summary
from tests.docs.pages import DOCS, ROOT


@pytest.mark.parametrize("page", readme.PAGES)
def test_tables_are_those_of_the_results_files(page: str) -> None:
    text = (ROOT / page).read_text()
    assert readme.render(page, text) == text


def test_what_the_prose_says_of_a_steps_cost() -> None:
    ratios = {
        path.stem.removeprefix("overhead").lstrip("-"): {
            name: row["ratio"] for name, row in results.load(path)["contestants"].items()
        }
        for path in readme.STEP_RESULTS.glob("overhead*.json")
    }
    assert ratios.keys() == {"", "lenet", "resnet18", "transformer"}  # the MLP's name is left out
    each = ratios.values()

    def spread(*found: float) -> str:
        return " to ".join(f"{x:.1f}" if x < 4 else f"{x:.0f}" for x in (min(found), max(found)))

    mlp, *others = sorted((own[BY_DEFAULT] for own in each), reverse=True)
    assert mlp == ratios[""][BY_DEFAULT]
    assert spread(*others) == "1.1 to 1.3"
    assert f"{mlp:.1f}" == "2.9"
    assert spread(*(own[AT_FIRST] for own in each)) == "5 to 17"
    assert spread(*(own[AT_FIRST] / own["APO, blocks of 64, after one meta-update"] for own in each)) == "5 to 6"
    assert spread(*(own["AdaptiveLR on SGDm"] for own in each)) == "1.3 to 1.5"
    assert spread(*(own[name] for own in each for name in ("AdamW, foreach", "AdamW, fused"))) == "1.0 to 1.4"
    assert FIRST_STEPS == 40
    for page, times in ((ROOT / "README.md", "times"), (DOCS / "choosing.md", "×")):
        text = " ".join(page.read_text().split())
        assert f"1.3 to 1.5 {times} " in text
        assert "(AdamW: 1.0 to 1.4)" in text
        assert "1.1 to 1.3 " in text
        assert f"2.9 {times}" in text
        assert "5 to 6 plain steps' time" in text or "takes 5 to 6 times as long as one without" in text
        assert f"; 5 to 17 {times} in the first 40 steps" in text


def test_what_the_experiments_say_of_the_start() -> None:
    tasks = summary(results.load(readme.COMMITTED / "studies" / "start.json")["runs"])["start"]
    told = (DOCS / "experiments.md").read_text()
    for name in ("ill-conditioned", "diabetes", "digits"):
        assert f"| {name} | {tasks[name][0]:.2e} (" in told


def test_what_readme_says_of_who_is_ahead() -> None:
    """APO's defaults end below SGDm, Adam and Shampoo on all of the tasks, and above KFAC on Protein alone."""
    rows = [row.split("|")[1:] for row in readme.TABLES["summary"]().splitlines()[2:]]
    losses = {row[0].strip(): [float(cell.split()[0]) for cell in row[1:7]] for row in rows}
    assert len(losses) == 6
    assert all(apo < min(sgdm, adam, shampoo) for sgdm, adam, _, shampoo, apo, _ in losses.values())
    assert {task for task, (*_, kfac, _, apo, _) in losses.items() if kfac < apo} == {"protein"}
    assert losses["protein"][4] / losses["protein"][2] == pytest.approx(1.04, abs=0.005)
    for task in ("protein", "mnist-autoencoder"):
        *_, defaults, searched = losses[task]
        assert defaults < searched


def test_what_is_said_of_the_peers() -> None:
    """Where APO's defaults are below a searched optimizer, at equal steps and in equal time."""
    losses: dict[str, dict[str, dict[str, float]]] = {}
    for path in (readme.COMMITTED / "peers").glob("*.json"):
        content = results.load(path)
        found = peers.complete(content["runs"])
        early, end = peers.judged_at(content["steps"])
        finals = {name: peers.best(own, partial(peers.loss_at, step=end))[1] for name, own in found.items()}
        measures: dict[str, Callable[[peers.Run], float]] = {
            "early": partial(peers.loss_at, step=early),
            "end": partial(peers.loss_at, step=end),
        }
        losses[path.stem] = {
            name: {what: mean(map(of, peers.best(own, of)[1])) for what, of in measures.items()}
            for name, own in found.items()
        }
        for base in ("adamw", "sgdm"):
            pairs = zip(finals["apo"], finals[base], strict=True)
            losses[path.stem]["apo"][base] = mean(peers.after_seconds(a, b["seconds"][-1]) for a, b in pairs)
    assert losses.keys() == {"gpt", "cifar10-cnn", "cifar10-lenet", "mnist-autoencoder", "protein", "pinn"}
    lower: dict[str, set[str]] = {}
    for task, own in losses.items():
        apo, end = own["apo"], {name: own[name]["end"] for name in RATES if name in own}
        for base in ("adamw", "sgdm"):
            assert apo["early"] < own[base]["early"]
            assert apo["end"] < end[base]
        lower[task] = {name for name in end if end[name] < apo["end"]}
        assert (apo["adamw"] < end["adamw"]) == (task in ("cifar10-lenet", "mnist-autoencoder", "pinn"))
        assert (apo["sgdm"] < end["sgdm"]) == (task in ("gpt", "cifar10-lenet", "mnist-autoencoder", "pinn"))
        assert own["apo-lr:adamw"]["end"] < 1.02 * end["adamw"]
        assert {"gpt": 1.02, "cifar10-cnn": 1.06, "cifar10-lenet": 1.02, "mnist-autoencoder": 1.135}.get(
            task, 1.0
        ) > own["apo-lr:sgdm"]["end"] / end["sgdm"]
    assert {task for task, names in lower.items() if not names} == {"gpt", "mnist-autoencoder", "pinn"}
    assert {"muon", "soap"} <= lower["cifar10-cnn"] & lower["cifar10-lenet"]
    protein = losses["protein"]
    assert protein["apo"]["end"] / protein["soap"]["end"] == pytest.approx(1.03, abs=0.005)
    for task in ("cifar10-lenet", "mnist-autoencoder"):
        assert 0.965 < losses[task]["apo"]["adamw"] / losses[task]["adamw"]["end"] < 0.995


def test_what_the_experiments_say_of_the_study() -> None:
    runs = results.load(readme.COMMITTED / "studies" / "meta-update.json")["runs"]
    losses = {name: {task: cell[0] for task, cell in row.items()} for name, row in summary(runs).items()}
    size, length, bare = losses["default"], losses["by length + WSD"], losses["λ_WSD 0"]
    text = " ".join((DOCS / "experiments.md").read_text().split())
    for said in (
        f"{size['digits-autoencoder']:.1f} against {length['digits-autoencoder']:.1f} on the autoencoder",
        f"{size['diabetes']:.1e} against {length['diabetes']:.1e} on diabetes",
        f"({bare['digits']:.2g} against {size['digits']:.2g})",
        f"diabetes ends at {losses['step']['diabetes']:.1e}",
        f"on diabetes {losses['warm-up 50']['diabetes']:.3g} if only",
    ):
        assert said in text, said
