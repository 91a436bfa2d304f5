"""Classification and reconstruction of scikit-learn's digits, the stand-ins for MNIST."""

from __future__ import annotations

from benchmarks.paper.data.bundled import DIGITS, DIGITS_IMAGES
from benchmarks.paper.models import autoencoder, mlp
from benchmarks.paper.tasks.losses import BERNOULLI, CLASSIFICATION
from benchmarks.paper.tasks.task import Task

CLASSIFIER = Task(
    name="digits",
    title="classification of digits, MLP",
    model_name="MLP 64-256-256-10",
    build=lambda: mlp(64, 256, 256, 10),
    source=DIGITS,
    loss=CLASSIFICATION,
    batch_size=128,
    epochs=60,
    quick_epochs=6,
)

AUTOENCODER = Task(
    name="digits-autoencoder",
    title="deep sigmoid autoencoder of digits",
    model_name="autoencoder 64-128-64-32-8",
    build=lambda: autoencoder((64, 128, 64, 32, 8)),
    source=DIGITS_IMAGES,
    loss=BERNOULLI,
    batch_size=100,
    epochs=150,
    quick_epochs=10,
)
