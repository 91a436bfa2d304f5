"""``python -m benchmarks overhead``: what a step costs with each front end and with the baselines, on four models.

Whole steps are timed, closure included, ``interval`` steps at a time, so that each sample holds exactly one meta-step
(of APO's first steps each is one; with its default interval, so many steps at a time). The contestants of a model
take turns in one process. The baselines renew their factors and inverses (roots, bases) as often. Peak memory is taken
before, of each contestant in a process of its own.
"""

import argparse
import ctypes
import gc
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import apo
from benchmarks.common import results
from benchmarks.common.console import console, progress, table, wrote
from benchmarks.common.options import above_0, at_least_1, names_of
from benchmarks.common.steps import take_steps
from benchmarks.common.tables import short
from benchmarks.common.timing import cpu_threads, interleave
from benchmarks.paper.baselines import KFAC, Shampoo
from benchmarks.paper.baselines.packages import muon, soap
from benchmarks.paper.data.parallel_text import WORDS
from benchmarks.paper.models import Transformer, lenet, mlp, resnet18

Inputs = tuple[Tensor, ...]
Make = Callable[[nn.Module, Callable[[], Inputs]], Optimizer]
"""Makes an optimizer of a model, and of what returns the inputs of B′."""

DEFAULT_INTERVAL, WARMUP = (inspect.signature(apo.APO).parameters[name].default for name in ("interval", "warmup"))
BY_DEFAULT = f"APO, its default interval of {DEFAULT_INTERVAL}"
"""After the warm-up."""
FIRST_STEPS = 4 * WARMUP // DEFAULT_INTERVAL
AT_FIRST = f"APO, its first {FIRST_STEPS} steps"
"""With a meta-update at each, where there is little noise."""

COLUMNS = ["optimizer", "ms per step", "÷ SGDm", "peak memory ÷ weights"]


class TimedModel(NamedTuple):
    title: str
    build: Callable[[float], nn.Module]  # by a factor of the published width
    batch: Callable[[int], tuple[Inputs, Tensor]]  # that many inputs and targets
    sizes: tuple[int, int]  # of a batch, on a GPU and on a CPU


def _images(*shape: int) -> Callable[[int], tuple[Inputs, Tensor]]:
    return lambda size: ((torch.randn(size, *shape),), torch.randint(10, (size,)))


def _sentences(tokens: int) -> tuple[Inputs, Tensor]:
    """Pairs of 32 words each, as many as ``tokens`` targets take."""
    source, target = torch.randint(4, WORDS, (2, ceil(tokens / 32), 33))
    return (source, target[:, :-1]), target[:, 1:].flatten()


MODELS = {
    "mlp": TimedModel("MLP 784-1000-1000-10", lambda w: mlp(784, *2 * [ceil(1000 * w)], 10), _images(784), (100, 100)),
    "lenet": TimedModel("LeNet", lambda w: lenet(), _images(3, 32, 32), (128, 128)),
    "resnet18": TimedModel("ResNet-18", lambda w: resnet18(width=w), _images(3, 32, 32), (128, 32)),
    "transformer": TimedModel(
        "Transformer 6+6", lambda w: Transformer(WORDS, 8 * ceil(64 * w), 6, 4, ceil(1024 * w)), _sentences, (4096, 512)
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=names_of(MODELS), default=[*MODELS], help=f"of {', '.join(MODELS)}; all")
    parser.add_argument("--batch", type=at_least_1, help="examples, or the Transformer's tokens (default: the model's)")
    parser.add_argument("--seconds", type=above_0, help="time for each contestant (default: 30, with --quick 3)")
    parser.add_argument("--interval", type=at_least_1, default=10, help="a meta-update every N steps (%(default)s)")
    parser.add_argument("--threads", type=at_least_1, default=1, help="of the CPU's (default: %(default)s)")
    parser.add_argument("--width", type=above_0, help="factor of the models' widths (default: 1, with --quick 0.25)")


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure each model, print its table, write ``overhead.json`` (the MLP's) and ``overhead-MODEL.json``."""
    return {name: _measure(name, options) for name in options.models}


def _measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    batch = options.batch or MODELS[model].sizes[torch.device(options.device).type == "cpu"]
    own = {"model": model, "width": options.width or (0.25 if options.quick else 1.0), "batch": batch}
    options = argparse.Namespace(**vars(options) | own)
    makes = _contestants(options)
    with cpu_threads(options.threads), progress() as bar:
        # on a GPU each process has its own count, and most of what it takes is its start
        at_once = 1 if torch.device(options.device).type == "cpu" else len(os.sched_getaffinity(0)) // 2
        with ThreadPoolExecutor(max(at_once, 1)) as pool:
            measured = pool.map(lambda name: _in_a_process(name, options), makes)
            peaks = dict(zip(makes, bar.track(measured, total=len(makes), description="memory"), strict=True))
        task = bar.add_task("time", total=1.0)
        samples = interleave(
            {
                name: partial(next, _periods(make, options, options.width, _steps(name, options)))
                for name, make in makes.items()
            },
            seconds=options.seconds or (3.0 if options.quick else 30.0),
            advance=lambda share: bar.update(task, completed=share),
        )
    found = {
        name: {
            "step_seconds": sample.median / _steps(name, options),
            "spread": [x / _steps(name, options) for x in sample.spread],
            "periods": len(sample.times),
            "ratio": sample.median / _steps(name, options) / (samples["SGDm"].median / options.interval),
            "peak_memory": peaks[name],
        }
        for name, sample in samples.items()
    }
    settings = {key: getattr(options, key) for key in ("batch", "interval", "threads", "width")}
    title = ", ".join([MODELS[model].title, *(f"{key} {value:g}" for key, value in settings.items())])
    payload = {"model": model, "title": title, **settings, "contestants": found}
    console.print(table(title, COLUMNS, rows(found), text=COLUMNS[:1]))
    file = "overhead" if model == "mlp" else f"overhead-{model}"
    wrote(results.write(options.out, file, options.device, payload))
    return payload


def rows(contestants: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """What there is to show, by :data:`COLUMNS`."""
    for name, row in contestants.items():
        peak = row.get("peak_memory")
        yield [name, short(1e3 * row["step_seconds"]), f"{row['ratio']:.2f}", "–" if peak is None else f"{peak:.1f}"]


def _steps(name: str, options: argparse.Namespace) -> int:
    """Of a sample."""
    return DEFAULT_INTERVAL if name == BY_DEFAULT else int(options.interval)


def _contestants(options: argparse.Namespace) -> dict[str, Make]:
    def plain(kind: Callable[..., Optimizer], **settings: Any) -> Make:
        return lambda model, inputs: kind(model.parameters(), **settings)

    def preconditioned(**settings: Any) -> Make:
        return lambda model, inputs: apo.APO(model, goal(model, inputs), lr=0.01, **settings)

    goal, sgdm, N = apo.ProximalObjective, plain(SGD, lr=0.01, momentum=0.9), options.interval
    rare: dict[str, Any] = {"interval": N, "warmup": 0}
    makes = {
        "SGDm": sgdm,
        "AdamW, foreach": plain(AdamW, foreach=True),
        "AdamW, fused": plain(AdamW, fused=True),
        "AdaptiveLR on SGDm": lambda model, inputs: apo.AdaptiveLR(sgdm(model, inputs), goal(model, inputs), **rare),
        "APO, blocks of 64, after one meta-update": preconditioned(interval=10**9, warmup=0),
        BY_DEFAULT: preconditioned(warmup=0),
        "APO, blocks of 64": preconditioned(**rare),
        AT_FIRST: preconditioned(interval=1),
        **({"APO, full blocks": preconditioned(block_size=None, **rare)} if options.model == "mlp" else {}),
        "KFAC": lambda model, inputs: KFAC(
            model, lr=0.01, damping=0.1, factor_interval=N, inverse_interval=N, warmup=0
        ),
        # of these models only the vocabulary has a side above 1,024
        "Shampoo": plain(Shampoo, lr=0.01, grafting=True, block_size=1024, **rare),
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        settings = {"precondition_frequency": N, "max_precondition_dim": 1024}
        makes |= {"SOAP": lambda model, inputs: soap(model, **settings), "Muon": lambda model, inputs: muon(model)}
    return makes


def _periods(make: Make, options: argparse.Namespace, width: float, steps: int) -> Iterator[int]:
    """The bytes of a model's weights, once it is there; then again after so many steps each, on four batches."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = MODELS[options.model].build(width).to(options.device)
        made = [MODELS[options.model].batch(options.batch) for _ in range(4)]
    batches, others = cycle(made), islice(cycle(made), 2, None)

    def loss_at(step: int) -> Callable[[], Tensor]:
        inputs, targets = next(batches)
        return lambda: F.cross_entropy(model(*inputs).flatten(0, -2), targets)

    yield (weights := sum(p.nbytes for p in model.parameters()))
    optimizer = make(model, lambda: next(others)[0])
    while True:
        for _ in take_steps(optimizer, loss_at, range(steps)):
            pass
        yield weights


def _in_a_process(contestant: str, options: argparse.Namespace) -> float | None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_memory, contestant, options).result()


def peak_memory(contestant: str, options: argparse.Namespace) -> float | None:
    """The most that is held above a model and its gradients, activations included, ÷ the weights.

    For a process of its own. A narrow model goes before, with which libraries take what they keep to themselves. None
    where the system doesn't tell.
    """
    begin: Callable[[], object] = partial(torch.cuda.reset_peak_memory_stats, options.device)
    most: Callable[[], int] = partial(torch.cuda.max_memory_allocated, options.device)
    if torch.device(options.device).type != "cuda":
        anew, now = Path("/proc/self/clear_refs"), Path("/proc/self/status")
        if not anew.exists():
            return None
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back at once
        begin, most = partial(anew.write_text, "5"), lambda: 1024 * int(now.read_text().split("VmHWM:")[1].split()[0])
    torch.set_num_threads(options.threads)
    make = _contestants(options)[contestant]
    next(islice(_periods(make, options, options.width / 8, options.interval), 1, None))
    periods = _periods(make, options, options.width, options.interval)
    weights = next(periods)
    gc.collect()
    begin()
    before = most()
    next(islice(periods, 1, None))  # two: the second begins with all state
    return (most() - before) / weights - 1
