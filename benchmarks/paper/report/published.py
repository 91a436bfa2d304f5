"""The figures of the paper's tables (Bae, Vicol, HaoChen, Grosse, NeurIPS 2022), to stand beside ours.

Names of tasks and optimizers are this project's. Figures 3, 4 and 5 are plots without printed numbers.
"""

Row = dict[str, float | None]


def _row(sgdm: float, adam: float, kfac: float | None, apo: float) -> Row:
    return {"sgdm": sgdm, "adam": adam, "kfac": kfac, "apo": apo}


TABLE_2: dict[str, Row] = {
    "cifar10-lenet": _row(75.73, 73.41, 76.63, 77.42),
    "cifar10-alexnet": _row(76.27, 76.09, 78.33, 81.14),
    "cifar10-vgg16": _row(91.82, 90.19, 92.05, 92.13),
    "cifar10-resnet18": _row(93.69, 93.27, 94.60, 94.75),
    "cifar10-resnet32": _row(94.40, 93.30, 94.49, 94.83),
    "cifar100-alexnet": _row(43.95, 41.82, 46.24, 52.35),
    "cifar100-vgg16": _row(65.98, 60.61, 61.84, 67.95),
    "cifar100-resnet18": _row(76.85, 70.87, 76.48, 76.88),
    "cifar100-resnet32": _row(77.47, 56.58, 75.70, 77.41),
    "svhn-resnet18": _row(96.19, 95.59, 96.08, 96.89),
    "iwslt14": _row(31.43, 34.60, None, 34.62),
}
"""Test accuracy in percent; BLEU for IWSLT'14, where Adam stands for AdamW."""

TABLE_3: dict[str, Row] = {
    "cifar10-lenet": {"sgdm": 75.65, "kfac": 74.95, "apo": 77.25},
    "cifar10-resnet18": {"sgdm": 94.15, "kfac": 92.72, "apo": 94.79},
    "cifar100-resnet18": {"sgdm": 73.53, "kfac": 73.12, "apo": 75.47},
}
"""Test accuracy in percent of 16-bit networks."""

TABLE_4_COLUMNS = ("cifar10-resnet32", "cifar10-resnet34", "cifar10-wrn-28-10", "cifar100-wrn-28-10")

TABLE_4: dict[str, tuple[tuple[float, float, float], ...]] = {
    "sgd": ((90.07, 93.30, 92.71), (93.00, 93.54, 94.27), (93.38, 94.86, 94.85), (76.29, 77.92, 76.87)),
    "sgdm": ((89.40, 93.34, 92.75), (92.99, 95.08, 94.47), (93.46, 95.98, 95.50), (74.81, 81.01, 79.33)),
    "rmsprop": ((89.84, 91.94, 91.28), (92.87, 93.87, 93.97), (92.91, 93.60, 94.22), (72.06, 76.06, 74.17)),
    "adam": ((90.45, 92.26, 91.81), (93.23, 94.12, 93.80), (92.81, 94.04, 93.83), (72.01, 75.53, 76.33)),
}
"""``(fixed, decay, APO)`` for each of :data:`TABLE_4_COLUMNS`: test accuracy in percent, means of four restarts."""
