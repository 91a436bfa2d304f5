"""The measured tables of docs/benchmarks.md and README, made from the results files.

``python -m benchmarks.readme`` writes them anew. A table stands between ``<!-- name -->`` and ``<!-- /name -->``. A
test compares the pages with the files, so a figure that no run has given can't stand there.
"""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.common import results
from benchmarks.common.tables import markdown, short
from benchmarks.kernels.throughput.contestants import BLOCKS, CHAIN, FULL, INVERSE, NAMES
from benchmarks.paper import overhead
from benchmarks.paper.report import peers
from benchmarks.paper.report.runs import SeedGroup, collect, grouped
from benchmarks.paper.studies.tables import summary
from benchmarks.paper.training.optimizers import METHODS
from benchmarks.paper.training.search_files import COMMITTED

ROOT = Path(__file__).parent.parent
RESULTS = COMMITTED / "amd-epyc"
STEP_RESULTS = COMMITTED / "intel-xeon"
GPU_RESULTS = COMMITTED / "nvidia-h100"
COMPILED_RESULTS = COMMITTED / "triton-3.7.1"
TITLES = {
    "mlp": "MLP 784-1000-1000-10",
    "lenet": "LeNet",
    "vgg16": "VGG16",
    "resnet18": "ResNet-18",
    "transformer": "Transformer 6+6, 512",
}


def render(page: str, text: str) -> str:
    """A page's text with every table as the results files have it."""
    for name in PAGES[page]:
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(opening) != 1 or text.count(closing) != 1:
            raise ValueError(f"{page} must hold the marks of the table {name!r} once")
        before, rest = text.split(opening)
        text = f"{before}{opening}{TABLES[name]()}\n{closing}{rest.split(closing)[1]}"
    return text


def _machine() -> str:
    content = results.load(RESULTS / "throughput.json")
    torch, python = content["environment"]["packages"]["torch"], content["environment"]["python"]
    rates = (f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in content["matmul_flops_per_s"].items())
    return (
        f"Measured on {content['device_name']}, {content['threads']} thread, torch {torch}, Python {python}, whose "
        f"matrix products reach {', '.join(rates)}."
    )


def _ratios() -> str:
    header = ["", "forward ÷ chain", "forward + VJP ÷ autograd", "bf16 ÷ fp32", "fp16 ÷ fp32", "full ÷ blocks of 64"]
    keys = ["forward", "with VJP", "in bf16", "in fp16", "full/blocks"]
    rows = [
        [TITLES[row["model"]], *("–" if row[key] is None else f"{row[key]:.2f}" for key in keys)]
        for row in results.load(RESULTS / "throughput.json")["ratios"]
    ]
    return markdown(header, rows, numbers=True)


def _times() -> str:
    content = results.load(RESULTS / "throughput.json")
    cells = {(r["model"], r["operation"], r["contestant"]): r for r in content["rows"] if r["dtype"] == "fp32"}
    rows = [
        [TITLES[model], operation, *(_milliseconds(cells[model, operation, name]) for name in NAMES)]
        for model in TITLES
        for operation in ("apply", "refresh", "step")
    ]
    return markdown(["ms, fp32", "", *NAMES], rows, numbers=True)


def _milliseconds(row: dict[str, Any]) -> str:
    if "median_ms" not in row:
        return f"({row['expected_s']:.0f} s expected)" if "expected_s" in row else "failed"
    return short(row["median_ms"])


def _shapes() -> str:
    content = results.load(RESULTS / "throughput.json")
    cells = {(row["m"], row["n"], row["contestant"]): row["median_ms"] for row in content["by_shape"]}
    rows = []
    for m, n in ((1000, 785), (1000, 1001), (256, 2305), (512, 2049), (512, 4609)):
        chain, full, blocks = (cells[m, n, name] for name in (CHAIN, FULL, BLOCKS))
        rows.append([f"{m}×{n}", *(f"{x:,.1f}" for x in (chain, full, blocks)), f"{full / blocks:.1f}×"])
    header = ["layer", "chain, ms", "full, ms", "blocks of 64, ms", "blocks faster than full by"]
    return markdown(header, rows, numbers=True)


def _stability() -> str:
    content = results.load(RESULTS / "stability.json")
    records = {(each["dtype"], each["method"]): each for each in content["summary"]["recorded"]}
    rows = []
    for method, label in content["methods"].items():
        if method != "limit":
            found = [records[dtype, method] for dtype in ("fp32", "bf16", "fp16")]
            rows.append([label, *map(_breakdowns, found), *(f"{each['worst_arithmetic']:.0e}" for each in found)])
    header = ["recorded layers", "breakdowns in fp32", "in bf16", "in fp16", "worst arithmetic error in fp32", "bf16"]
    return markdown([*header, "fp16"], rows, numbers=True)


def _breakdowns(record: dict[str, Any]) -> str:
    count = f"{record['broken']} of {record['problems']}"
    return f"{count}, none from {record['saved_from']:g}" if record["broken"] else count


def _learning_rates() -> str:
    rows = []
    for name, each in results.load(RESULTS / "learning_rates.json")["optimizers"].items():
        fixed, learned, best = _by_rate(each["fixed"]), _by_rate(each["learned"]), each["best_fixed"]
        losses, accuracies = zip(*(learned[lr] for lr in learned if lr != 1000 * best), strict=True)
        cells = [
            f"{fixed[best][0]:.1e} at {best:g}",
            f"{min(losses):.1e} to {max(losses):.1e}",
            f"{max(accuracy for _, accuracy in fixed.values()):.1f}",
            f"{min(accuracies):.1f} to {max(accuracies):.1f}",
            "{:.1e}, {:.1f}".format(*learned[1000 * best]),
        ]
        rows.append([name, *cells])
    header = ["optimizer", "loss, best fixed rate", "loss, learned from 1e-4 … 1e-1", "accuracy, best fixed rate, %"]
    return markdown([*header, "accuracy, learned, %", "from 1000 × the best rate"], rows, numbers=True)


def _by_rate(outcomes: list[dict[str, Any]]) -> dict[float, tuple[float, float]]:
    """Mean loss and accuracy over the seeds, by initial rate."""
    groups: dict[float, list[dict[str, Any]]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome["initial"], []).append(outcome)
    return {
        lr: (fmean(float(each["loss"]) for each in group), fmean(each["accuracy"] for each in group))
        for lr, group in groups.items()
    }


def _overhead() -> str:
    """A table for each model and CPU, the MLP's first."""
    found = (path for path in COMMITTED.glob("*/overhead*.json") if path.parent != GPU_RESULTS)
    return "\n\n".join(map(_step_costs, sorted(found, key=lambda path: (path.stem, path))))


def _step_costs(path: Path) -> str:
    content = results.load(path)
    title = content.get("title", "MLP 784-1000-1000-10, batch 100, interval 10, threads 1, width 1")
    table = markdown(overhead.COLUMNS, overhead.rows(content["contestants"]), numbers=True)
    return f"{title}, {content['environment']['device']}:\n\n{table}"


def _gpu() -> str:
    """The machine in a line, and the kernels' times in every dtype."""
    content = results.load(GPU_RESULTS / "throughput-graphs.json")
    environment = content["environment"]
    versions = "torch {torch}, Triton {triton}".format(**environment["packages"])
    rates = ", ".join(f"{x / 1e12:.0f} TFLOP/s in {name}" for name, x in content["matmul_flops_per_s"].items())
    machine = (
        f"Measured on {content['device_name']}, {versions}, Python {environment['python']}, "
        f"whose matrix products reach {rates}, and whose copies reach {content['copy_bytes_per_s'] / 1e9:,.0f} GB/s."
    )
    cells: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in content["rows"]:
        cells.setdefault((TITLES[row["model"]], row["operation"], row["dtype"]), {})[row["contestant"]] = row
    names = (FULL, BLOCKS, CHAIN, INVERSE)
    rows = [
        [*what, *(_milliseconds(own[name]) for name in names), f"{own[BLOCKS]['share_of_copy']:.0%}"]
        for what, own in cells.items()
    ]
    header = ["ms", "", "", *names, f"{BLOCKS}: share of copy bandwidth"]
    return f"{machine}\n\n{markdown(header, rows, numbers=True)}"


KERNELS = {
    "tile: forward": ("tile_forward", "tile_keep", "tile_dG"),
    "tile: update": ("tile_update",),
    "tile: derivatives": ("tile_backward",),
    "GEMM: forward": ("right", "right_keep", "scale", "scale_keep", "left", "left_keep", "out"),
    "GEMM: update": ("update",),
    "GEMM: pair": ("pair",),
    "GEMM: dA, dB, dG": ("left_dB", "dA_dG"),
    "packing, sums": ("pack", "sum_parts"),
}


def _targets() -> str:
    rows = results.load(COMPILED_RESULTS / "targets.json")["kernels"]
    names = list(dict.fromkeys(row["target"] for row in rows))
    lines = []
    for title, stages in KERNELS.items():
        for dtype in ("bfloat16", "float16", "float32"):
            of_all = [row for row in rows if row["stage"] in stages and row["dtype"] == dtype]
            lines.append([title, dtype, *(_worst([row for row in of_all if row["target"] == name]) for name in names)])
    return markdown(["", "", *names], lines, numbers=True)


def _worst(rows: list[dict[str, Any]]) -> str:
    registers, spills, shared = (max(row[key] for row in rows) for key in ("registers", "spills", "shared"))
    matrix = {name.strip("._").removeprefix("v_").upper() for row in rows for name in row["matrix"]}
    return f"{registers} / {spills} / {shared / 1024:.0f} {'+'.join(sorted(matrix))}".rstrip()


COMPARED = ("sgdm", "adam", "kfac", "shampoo", "apo-defaults", "apo")
LABELS = (*(METHODS[name].label for name in COMPARED[:-1]), "APO, searched")


def _searched_tasks() -> list[tuple[str, list[SeedGroup], list[str]]]:
    """The tasks that all were run on after searches: the name, each one's runs, and its loss after equal steps."""
    found = []
    for task, runs in collect([COMMITTED]).items():
        groups = {group.name: group for group in grouped(runs)}
        if groups.keys() >= set(COMPARED):
            shown = [groups[name] for name in COMPARED]
            step = min(min(group.last("step")) for group in shown if not group.diverged)
            found.append((task, shown, [_loss(group, step) for group in shown]))
    return found


def _tasks() -> str:
    rows = []
    for task, groups, losses in _searched_tasks():
        runs = groups[0].runs
        what = f"{task}, {runs[0]['epochs']:.3g} epochs, {len(runs)} seed{'s'[: len(runs) - 1]}"
        rows.append([what, *(f"{loss}, {short(group.step_ms)}" for loss, group in zip(losses, groups, strict=True))])
    return markdown(["task", *(f"{label}: loss, ms per step" for label in LABELS)], rows, numbers=True)


def _summary() -> str:
    """README's one table: the losses, and what a step of APO costs."""
    rows = []
    for task, groups, losses in _searched_tasks():
        of = dict(zip(COMPARED, groups, strict=True))
        rows.append([task, *losses, f"{of['apo-defaults'].step_ms / of['adam'].step_ms:.1f}×"])
    return markdown(["task", *LABELS, "a step of APO ÷ Adam's"], rows, numbers=True)


def _loss(group: SeedGroup, step: float) -> str:
    loss = median(group.loss_at("step", step))
    if not isfinite(loss):
        return "diverged"
    return f"{loss:.3g} ({group.diverged} of {len(group.runs)} diverged)" if group.diverged else f"{loss:.3g}"


def _rates() -> str:
    """The learning rate fixed, decayed by hand and learned, on the MNIST MLP (Figure 4, right)."""
    searched, *starts = (
        {group.name: group for group in grouped(collect([folder])["mnist"])}
        for folder in (COMMITTED, COMMITTED / "starts" / "1e-4", COMMITTED / "starts" / "1")
    )
    rows = []
    for base, learned in (("sgdm", "apo-lr"), ("rmsprop", "apo-lr:rmsprop")):
        default = f"apo-lr:{base}+cooldown"
        found = [searched[name] for name in (base, f"{base}+step", learned, default)]
        found += [at[default] for at in starts]
        losses = [sorted(group.last("loss")) for group in found]
        cells = [f"{fmean(each):.4f} ({each[0]:.4f} to {each[-1]:.4f})" for each in losses]
        rows.append([METHODS[base].label, *cells, " / ".join(f"{fmean(group.last('metric')):.2f}" for group in found)])
    header = ["", "best fixed rate", "best step schedule", "AdaptiveLR, searched", "its default, cooled down"]
    header += ["the same from 1e-4", "from 1", "test accuracy of the six, %"]
    return markdown(header, rows, numbers=True)


STUDIED = {
    "default": "APO, defaults",
    "interval 2": "APO, interval 2",
    "interval 10": "APO, interval 10",
    "λ_WSD 0": "APO, λ_WSD 0",
    "momentum 0": "APO, no momentum",
    "momentum 0.9": "APO, momentum 0.9",
    "full blocks": "APO, full blocks",
    "moments": "APO, A and B start from second moments",
    "by length + WSD": "APO, steps by their length alone",
    "by length": "the same, momentum 0.9, λ_WSD 0",
    "adam fast": "APO, Adam on A, B and S",
    "P fixed": "APO, P fixed: only the rate is learned",
    **{name: name for name in ("KFAC", "Shampoo", "Adam", "SGDm")},
}


def _study() -> str:
    found = summary(results.load(COMMITTED / "studies" / "meta-update.json")["runs"])
    tasks = ("ill-conditioned", "diabetes", "digits-autoencoder", "digits")
    rows = []
    for name, label in STUDIED.items():
        cells = (found[name].get(task) for task in tasks)
        rows.append([label, *("" if cell is None else f"{cell[0]:#.3g} ({cell[3]})" for cell in cells)])
    return markdown(["training loss (seeds)", *tasks], rows, numbers=True)


TABLES: dict[str, Callable[[], str]] = {
    "machine": _machine,
    "ratios": _ratios,
    "times": _times,
    "shapes": _shapes,
    "stability": _stability,
    "learning rates": _learning_rates,
    "overhead": _overhead,
    "gpu": _gpu,
    "gpu_overhead": lambda: "\n\n".join(map(_step_costs, sorted(GPU_RESULTS.glob("overhead*.json")))),
    "targets": _targets,
    "study": _study,
    "tasks": _tasks,
    "rates": _rates,
    "peers": lambda: peers.tables(COMMITTED / "peers"),
    "cooled": lambda: peers.cooled(COMMITTED / "peers"),
    "gpu_peers": lambda: peers.tables(GPU_RESULTS / "peers"),
    "summary": _summary,
}

PAGES: dict[str, list[str]] = {
    "docs/benchmarks.md": [name for name in TABLES if name != "summary"],
    "README.md": ["summary"],
}
"""Which tables stand on which page."""


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(render(page, path.read_text()))
