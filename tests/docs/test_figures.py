"""No figure stands in README or docs that the results files don't hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from apo_kernels.targets import TARGETS
from benchmarks import readme
from benchmarks.common import results
from benchmarks.common.tables import short
from benchmarks.kernels.throughput.contestants import BLOCKS, CHAIN, FULL, INVERSE
from benchmarks.paper.overhead import AT_FIRST, BY_DEFAULT, FIRST_STEPS
from benchmarks.paper.peers import LEARNED, RATES
from benchmarks.paper.report import peers
from benchmarks.paper.report.runs import collect, grouped
from benchmarks.paper.studies.tables import summary
from tests.docs.pages import DOCS, ROOT

README = ROOT / "README.md"
BETWEEN = "APO, blocks of 64, after one meta-update"


def words_of(page: Path) -> str:
    """A page's text, without its line breaks."""
    return " ".join(page.read_text().split())


def assert_said(page: Path, *sentences: str) -> None:
    text = words_of(page)
    for sentence in sentences:
        assert sentence in text, sentence


def step_ratios(path: Path) -> dict[str, float]:
    """Of a step's time to a plain step's, of each contestant."""
    return {name: row["ratio"] for name, row in results.load(path)["contestants"].items()}


def spread(found: Iterable[float], form: str = ".1f") -> str:
    found = list(found)
    return f"{min(found):{form}} to {max(found):{form}}"


@pytest.mark.parametrize("page", readme.PAGES)
def test_tables_are_those_of_the_results_files(page: str) -> None:
    text = (ROOT / page).read_text()
    assert readme.render(page, text) == text


def test_what_the_prose_says_of_a_steps_cost() -> None:
    ratios = {
        path.stem.removeprefix("overhead").lstrip("-"): step_ratios(path)
        for path in readme.STEP_RESULTS.glob("overhead*.json")
    }
    assert ratios.keys() == {"", "lenet", "resnet18", "transformer"}  # the MLP's name is left out
    each = ratios.values()
    mlp, *others = sorted((own[BY_DEFAULT] for own in each), reverse=True)
    assert mlp == ratios[""][BY_DEFAULT]
    assert spread(others) == "1.1 to 1.3"
    assert f"{mlp:.1f}" == "2.9"
    assert spread((own[AT_FIRST] for own in each), ".0f") == "5 to 17"
    assert spread((own[AT_FIRST] / own[BETWEEN] for own in each), ".0f") == "5 to 6"
    assert spread(own["AdaptiveLR on SGDm"] for own in each) == "1.3 to 1.5"
    assert spread(own[name] for own in each for name in ("AdamW, foreach", "AdamW, fused")) == "1.0 to 1.4"
    assert FIRST_STEPS == 40
    for page, times in ((README, "times"), (DOCS / "choosing.md", "×")):
        text = words_of(page)
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
    """APO's defaults end below SGDm, Adam and Shampoo on all of the tasks, and above KFAC on the first alone."""
    rows = [row.split("|")[1:] for row in readme.TABLES["summary"]().splitlines()[2:]]
    losses = {row[0].strip(): [float(cell.split()[0]) for cell in row[1:7]] for row in rows}
    assert len(losses) == 6
    assert all(apo < min(sgdm, adam, shampoo) for sgdm, adam, _, shampoo, apo, _ in losses.values())
    assert {task for task, (*_, kfac, _, apo, _) in losses.items() if kfac < apo} == {"ill-conditioned"}
    assert losses["protein"][4] < losses["protein"][5]  # the defaults, the search's best
    assert losses["mnist-autoencoder"][4] == losses["mnist-autoencoder"][5]


def test_what_is_said_of_the_autoencoder_by_the_clock() -> None:
    of = {group.name: group for group in grouped(collect([readme.COMMITTED])["mnist-autoencoder"])}
    then = median(of["sgdm"].last("seconds"))
    at = {name: f"{median(of[name].loss_at('seconds', then)):.0f}" for name in ("adam", "kfac", "apo-defaults")}
    epochs = {7: "seven", 8: "eight"}[round(3 * of["apo-defaults"].step_ms / of["adam"].step_ms)]
    assert_said(
        DOCS / "benchmarks.md",
        f"Adam's loss on the autoencoder is {at['adam']}, KFAC's {at['kfac']} and APO's {at['apo-defaults']}.",
        f"In the time of APO's three epochs Adam would have taken {epochs}.",
    )
    assert_said(README, f"Adam would be through {epochs} epochs by the time APO finishes its three.")


def test_what_is_said_of_the_peers() -> None:
    """Where APO's defaults are below a searched optimizer, at equal steps and in equal time."""
    losses: dict[str, dict[str, dict[str, float]]] = {}
    for path in (readme.COMMITTED / "peers").glob("*.json"):
        content = results.load(path)
        found = peers.complete(content)
        early, end = peers.judged_at(content["steps"])
        measures: dict[str, Callable[[peers.Run], float]] = {
            "early": partial(peers.loss_at, step=early),
            "end": partial(peers.loss_at, step=end),
        }
        losses[path.stem] = {
            name: {what: mean(map(of, peers.best(own, of)[1])) for what, of in measures.items()}
            for name, own in found.items()
        }
        for base in ("adamw", "sgdm"):
            steps = peers.steps_in_time_of(base, "apo", content["clock"])
            losses[path.stem]["apo"][base] = mean(peers.after_steps(run, steps) for run in found["apo"]["default"])
    assert losses.keys() == {"gpt", "cifar10-cnn", "cifar10-lenet", "mnist-autoencoder", "protein", "pinn"}
    lower: dict[str, set[str]] = {}
    for task, own in losses.items():
        apo, end = own["apo"], {name: own[name]["end"] for name in RATES if name in own}
        for base in ("adamw", "sgdm"):
            assert apo["early"] < own[base]["early"]
            assert apo["end"] < end[base]
        lower[task] = {name for name in end if end[name] < apo["end"]}
        assert (apo["adamw"] < end["adamw"]) == (task in ("cifar10-cnn", "cifar10-lenet", "mnist-autoencoder"))
        assert (apo["sgdm"] < end["sgdm"]) == (task != "protein")
        said = {"pinn": (0.0, 0.5), "mnist-autoencoder": (0.925, 0.94)}
        least, most = said.get(task, (0.98, 1.045))
        assert least < own["apo-lr:adamw"]["end"] / end["adamw"] < most
        said = {"mnist-autoencoder": (0.885, 0.895), "gpt": (0.955, 0.965), "protein": (0, 1), "pinn": (0, 1)}
        least, most = (1.005, 1.015) if task == "cifar10-lenet" else said.get(task, (1.025, 1.035))
        assert least < own["apo-lr:sgdm"]["end"] / end["sgdm"] < most
    assert {task: names for task, names in lower.items() if names} == {
        "cifar10-cnn": {"muon", "soap", "schedule-free"},
        "cifar10-lenet": {"muon", "soap"},
        "protein": {"soap", "schedule-free"},
    }
    protein = losses["protein"]
    assert all(1 < protein["apo"]["end"] / protein[name]["end"] < 1.01 for name in ("soap", "schedule-free"))
    for task, ratio in (("cifar10-cnn", 0.97), ("cifar10-lenet", 0.9), ("mnist-autoencoder", 0.93), ("gpt", 1.005)):
        assert losses[task]["apo"]["adamw"] / losses[task]["adamw"]["end"] == pytest.approx(ratio, abs=0.005)


def test_what_is_said_of_losses_on_a_gpu() -> None:
    """Those of the CPU after equal steps, where APO is ahead; not in equal time."""
    took: dict[str, list[float]] = {}
    for task, off in (("gpt", 0.01), ("cifar10-cnn", 0.05)):
        content, on_cpu = (
            results.load(folder / "peers" / f"{task}.json") for folder in (readme.GPU_RESULTS, readme.COMMITTED)
        )
        end = partial(peers.loss_at, step=content["steps"])
        runs, former = (peers.complete(each) for each in (content, on_cpu))
        ends = {name: mean(map(end, peers.best(own, end)[1])) for name, own in runs.items()}
        for name in former.keys() - LEARNED.keys():
            assert ends[name] == pytest.approx(mean(map(end, peers.best(former[name], end)[1])), rel=off)
        assert ends["apo"] < min(ends["adamw"], ends["sgdm"])
        assert (min(ends, key=ends.__getitem__) == "apo") == (task == "gpt")
        steps = peers.steps_in_time_of("adamw", "apo", content["clock"])
        assert mean(peers.after_steps(run, steps) for run in runs["apo"]["default"]) > ends["adamw"]

        rows, seconds, then = content["clock"]["step"], content["clock"]["seconds"], on_cpu["clock"]["seconds"]
        late = {name: x[-1] - x[rows.index(content["steps"] // 2)] for name, x in seconds.items()}
        whole, theirs = seconds["apo"][-1], seconds["adamw"][-1]
        for what, number in {
            "whole": whole / theirs,
            "on a CPU": then["apo"][-1] / then["adamw"][-1],
            "first": 100 * seconds["apo"][rows.index(50)] / whole,
            "late": late["apo"] / late["adamw"],
        }.items():
            took.setdefault(what, []).append(number)
        took.setdefault("rates", []).extend(seconds[name][-1] / theirs for name in LEARNED)
    assert_said(
        DOCS / "benchmarks.md",
        "take {:.2f} and {:.2f} times as long as AdamW's,".format(*took["whole"]),
        "against {:.2f} and {:.2f} times on the CPU.".format(*took["on a CPU"]),
        "The first 50 steps take {:.0f} and {:.0f}% of its time.".format(*took["first"]),
        "Of the last 500 each takes {:.2f} and {:.2f} times as long as AdamW's.".format(*took["late"]),
        f"whose steps take {spread(took['rates'], '.2f')} times as long as AdamW's.",
    )
    assert min(took["whole"]) > 2
    assert_said(README, "There a small network's 1,000 steps take over twice AdamW's time.")


def test_what_is_said_of_learned_rates_from_any_start() -> None:
    """The best fixed rate's loss and today's stand in the experiments' table; from afar they are near it."""
    tasks = {"PINN": "pinn", "LeNet": "cifar10-lenet", "CNN": "cifar10-cnn", "autoencoder": "mnist-autoencoder"}
    measured: dict[tuple[str, str, str], tuple[float, float]] = {}
    for path in (readme.COMMITTED / "peers").glob("*.json"):
        content = results.load(path)
        found, of = peers.complete(content), partial(peers.loss_at, step=content["steps"])
        for learned, base in LEARNED.items():
            fixed = mean(map(of, peers.best(found[base], of)[1]))
            for rate, runs in found[learned].items():
                measured[path.stem, base, rate] = fixed, mean(map(of, runs))
    table = (DOCS / "experiments.md").read_text().split("as it is now |\n")[1].split("\n\n")[0].splitlines()[1:]
    for row in table:
        what, fixed, *_, now = (cell.strip() for cell in row.strip("|").split("|"))
        task, base, rate = what.removesuffix(", its best").split(", ")
        assert [fixed, now] == [*map(short, measured[tasks[task], base.lower(), f"{float(rate):g}"])], row
    assert {(task, base) for task, base, _ in measured} == set(product(peers.TASKS, LEARNED.values()))
    assert all(loss < 1.35 * fixed for fixed, loss in measured.values())


def test_what_is_said_of_learned_rates_that_fall_in_the_end() -> None:
    above, far = dict[tuple[str, str], float](), []
    for task, base in product(peers.TASKS, ("adamw", "sgdm")):
        content = results.load(readme.COMMITTED / "peers" / f"{task}.json")
        lr = peers.best_rate(content["runs"], base, content["steps"], RATES[base])

        def ends(key: str, content: dict[str, Any] = content) -> float:
            runs = [run for name, run in content["runs"].items() if name.startswith(f"{key}/")]
            return mean(peers.loss_at(run, content["steps"]) for run in runs)

        constant, cooled, learned = (
            ends(f"{name}/{lr:g}") for name in (base, f"{base}+cooldown", f"apo-lr:{base}+cooldown")
        )
        assert 0.17 < learned / constant < 0.975
        above[task, base] = learned / cooled
        far += [ends(f"apo-lr:{base}+cooldown/{start:g}") / constant for start in (1e-4, 1.0)]
    assert max(far) < 1.25
    said = {("cifar10-cnn", "adamw"): 1.09, ("cifar10-cnn", "sgdm"): 1.04, ("pinn", "sgdm"): 1.35}
    said |= {("gpt", "sgdm"): 0.91, ("mnist-autoencoder", "sgdm"): 0.88}
    for key, ratio in above.items():
        assert ratio < 1.02 if key not in said else ratio == pytest.approx(said[key], abs=0.005)


def test_what_the_experiments_say_of_the_study() -> None:
    runs = results.load(readme.COMMITTED / "studies" / "meta-update.json")["runs"]
    losses = {name: {task: cell[0] for task, cell in row.items()} for name, row in summary(runs).items()}
    size, length, bare = losses["default"], losses["by length + WSD"], losses["λ_WSD 0"]
    assert_said(
        DOCS / "experiments.md",
        f"{size['digits-autoencoder']:.1f} against {length['digits-autoencoder']:.1f} on the autoencoder",
        f"{size['diabetes']:.1e} against {length['diabetes']:.1e} on diabetes",
        f"({bare['digits']:.2g} against {size['digits']:.2g})",
        f"diabetes ends at {losses['step']['diabetes']:.1e}",
        f"on diabetes {losses['warm-up 50']['diabetes']:.3g} if only",
    )


def test_what_is_said_of_spills() -> None:
    found = {name: results.load(readme.COMMITTED / name / "targets.json") for name in ("triton-3.7.1", "triton-3.6.0")}
    assert {name: len(content["kernels"]) for name, content in found.items()} == dict.fromkeys(found, 988)
    assert {row["target"] for content in found.values() for row in content["kernels"]} == set(TARGETS)
    spilled = [row for content in found.values() for row in content["kernels"] if row["spills"]]
    assert [(row["target"], row["dtype"], row["stage"], row["size"]) for row in spilled] == [
        ("sm_90", "float32", "model_slopes", "64")
    ]
    assert_said(
        DOCS / "benchmarks.md",
        f"spills in one of its 988 kernels, with {spilled[0]['spills']} instructions: in sm_90's slopes in float32",
    )


def test_what_is_said_of_the_kernels_on_a_gpu() -> None:
    content = results.load(readme.GPU_RESULTS / "throughput-graphs.json")
    rows = {(row["model"], row["operation"], row["dtype"], row["contestant"]): row for row in content["rows"]}
    timed = [(model, operation) for model in ("mlp", "resnet18", "transformer") for operation in ("apply", "step")]
    assert {key[:2] for key in rows} == set(timed)

    def of(contestant: str, *dtypes: str, key: str = "median_ms") -> list[float]:
        return [rows[(*each, dtype, contestant)][key] for each in timed for dtype in dtypes]

    def ratios(over: str, under: str, *dtypes: str) -> list[float]:
        return [x / y for x, y in zip(of(over, *dtypes), of(under, *dtypes), strict=True)]

    def shares(contestant: str, *dtypes: str) -> str:
        return spread((100 * x for x in of(contestant, *dtypes, key="share_of_matmul")), ".0f")

    three = "fp32", "bf16", "fp16"
    off = [abs(row[side] / row["median_ms"] - 1) for row in rows.values() for side in ("low_ms", "high_ms")]
    work = [x / y for x, y in zip(of(FULL, "fp32", key="gflop"), of(BLOCKS, "fp32", key="gflop"), strict=True)]
    halved = [x / y for x, y in zip(of(BLOCKS, "bf16"), of(BLOCKS, "fp32"), strict=True)]
    copied = [100 * x for x in of(BLOCKS, *three, key="share_of_copy")]
    in_bf16 = {each: f"{x:.1f}" for each, x in zip(timed, ratios(CHAIN, BLOCKS, "bf16"), strict=True)}
    full = {each: f"{x:.1f}" for each, x in zip(timed, ratios(CHAIN, FULL, "bf16"), strict=True)}
    applied, stepped = ([in_bf16[m, how] for m in ("resnet18", "transformer", "mlp")] for how in ("apply", "step"))
    assert_said(
        DOCS / "benchmarks.md",
        f"the median of {spread((row['rounds'] for row in rows.values()), 'd')} rounds",
        f"whose quartiles lie within {100 * max(off):.0f}% of it",
        f"In bf16 full blocks are {spread(ratios(CHAIN, FULL, 'bf16'))} times as fast",
        f"in fp16 {spread(ratios(CHAIN, FULL, 'fp16'))} times.",
        f"In fp32 there is no gain: they take {spread(ratios(FULL, CHAIN, 'fp32'), '.2f')} times the chain's time.",
        f"In 16 bits the chain reaches {shares(CHAIN, 'bf16', 'fp16')}% on these layers",
        f"and full blocks {shares(FULL, 'bf16', 'fp16')}%. In fp32 the chain reaches {shares(CHAIN, 'fp32')}%",
        f"and full blocks {shares(FULL, 'fp32')}%.",
        f"They take {spread(work, '.0f')} times fewer operations. In bf16 an apply is {applied[0]} times as fast on",
        f"ResNet-18, {applied[1]} times on the Transformer and {applied[2]} times on the MLP;",
        "a step {}, {} and {} times.".format(*stepped),
        f"In fp32 full blocks take {spread(ratios(FULL, INVERSE, 'fp32'))} times as long",
        f"in bf16 {spread(ratios(FULL, INVERSE, 'bf16'), '.2f')} times.",
        f"Blocks of 64 are {spread(ratios(INVERSE, BLOCKS, *three))} times as fast as the inverses.",
        f"They use {spread(copied, '.0f')}% of the copy bandwidth. In bf16, with half the bytes, they take",
        f"{spread(halved, '.2f')} of fp32's time.",
    )
    assert_said(
        README,
        f"is {full['resnet18', 'step']} times as fast as in plain torch for ResNet-18's layers",
        f"and {full['transformer', 'step']} times for a Transformer's.",
        f"With blocks of 64 it is {stepped[0]} and {stepped[1]} times as fast as plain torch with full ones.",
    )


def test_what_is_said_of_single_layers_on_a_gpu() -> None:
    content = results.load(readme.GPU_RESULTS / "throughput-graphs.json")
    times = {(row["m"], row["n"], row["contestant"]): row["median_ms"] for row in content["by_shape"]}
    shapes = {key[:2] for key in times}
    assert [n % 2 for _, n in shapes].count(0) == 1
    full, blocks = ([times[(*shape, name)] / times[(*shape, CHAIN)] for shape in shapes] for name in (FULL, BLOCKS))
    slower, behind = ([x for x in each if x > 1] for each in (full, blocks))
    assert len(behind) == 3
    text = words_of(DOCS / "benchmarks.md")
    assert f"on {len(slower)} of {len(shapes)} shapes they take {spread(slower)} times the chain's time." in text
    assert f"Blocks of 64 take up to {max(behind):.1f} times the chain's time on three small shapes." in text


def test_what_is_said_of_a_training_step_on_a_gpu() -> None:
    found = results.load(readme.GPU_RESULTS / "overhead-resnet18.json")["contestants"]
    at, on_cpu = (step_ratios(each / "overhead-resnet18.json") for each in (readme.GPU_RESULTS, readme.STEP_RESULTS))
    off = {name: max(abs(x / row["step_seconds"] - 1) for x in row["spread"]) for name, row in found.items()}
    peak = {name: f"{row['peak_memory']:.1f}" for name, row in found.items()}
    rates, fused = at["AdaptiveLR on SGDm"], at["AdamW, fused"]
    assert_said(
        DOCS / "benchmarks.md",
        f"There are {spread((row['periods'] for row in found.values()), 'd')} samples of each.",
        f"SGDm's quartiles lie up to {off['SGDm']:.0%} from the median",
        f"and others' up to {max(off.values()):.0%}, so ratios are rough.",
        f"costs {at[BY_DEFAULT]:.2f} SGDm steps after the warm-up, and {at[BETWEEN]:.2f} between two meta-updates.",
        f"these are {on_cpu[BY_DEFAULT]:.2f} and {on_cpu[BETWEEN]:.2f}.",
        f"In its first 40 steps it costs {at[AT_FIRST]:.1f} SGDm steps",
        f"and {at[AT_FIRST] / at[BETWEEN]:.1f} times as much as between meta-updates.",
        f"On the CPU these are {on_cpu[AT_FIRST]:.1f} and {on_cpu[AT_FIRST] / on_cpu[BETWEEN]:.1f}.",
        f"costs {at['APO, blocks of 64']:.1f} SGDm steps, KFAC {at['KFAC']:.1f} and SOAP {at['SOAP']:.1f}.",
        f"`AdaptiveLR` costs {rates:.2f}, Muon {at['Muon']:.2f} and fused AdamW {fused:.2f}.",
        f"{peak[BY_DEFAULT]} times the weights, SGDm's {peak['SGDm']} times and KFAC's {peak['KFAC']} times.",
    )
    adamw = spread((at["AdamW, foreach"], fused))
    default, first = f"{at[BY_DEFAULT]:.1f}", f"{at[AT_FIRST]:.0f}"
    longer = f"{at[AT_FIRST] / at[BETWEEN]:.0f}"
    text = words_of(README)
    cost = f"{default} times; {first} times in the first 40 steps"
    assert f"| {rates:.1f} times SGD's time (AdamW: {adamw}) | {cost} |" in text
    assert f"5 to 6 plain steps' time, on the H100 {longer}." in text
    text = words_of(DOCS / "choosing.md")
    assert f"| on an H100 | {rates:.1f} × (AdamW: {adamw}) | {default} ×; {first} × in the first 40 steps |" in text
    assert f"on an H100 {longer} times." in text
    assert f"costs {at[BY_DEFAULT]:.2f} SGDm steps on an H100, against {on_cpu[BY_DEFAULT]:.2f} on a CPU" in text
