"""MNIST: the deep autoencoder (Figure 4, middle) and the MLP whose rate is adapted (Figure 4, right).

Scikit-learn's digits stand in for MNIST.
"""

from benchmarks.paper.data.mnist import MNIST, MNIST_IMAGES
from benchmarks.paper.data.without_files import DIGITS, DIGITS_IMAGES
from benchmarks.paper.models import autoencoder, mlp
from benchmarks.paper.tasks.losses import BERNOULLI, CLASSIFICATION
from benchmarks.paper.tasks.task import Task

SMALL = (
    Task(
        name="digits",
        title="classification of digits, MLP",
        model_name="MLP 64-256-256-10",
        build=lambda: mlp(64, 256, 256, 10),
        source=DIGITS,
        loss=CLASSIFICATION,
        batch_size=128,
        epochs=60,
        quick_epochs=6,
    ),
    Task(
        name="digits-autoencoder",
        title="deep sigmoid autoencoder of digits",
        model_name="autoencoder 64-128-64-32-8",
        build=lambda: autoencoder((64, 128, 64, 32, 8)),
        source=DIGITS_IMAGES,
        loss=BERNOULLI,
        batch_size=100,
        epochs=150,
        quick_epochs=10,
    ),
)
PAPER = (
    Task(
        name="mnist-autoencoder",
        title="8-layer sigmoid autoencoder of MNIST",
        place="Figure 4 (middle)",
        model_name="autoencoder 784-1000-500-250-30",
        build=autoencoder,
        source=MNIST_IMAGES,
        loss=BERNOULLI,
        batch_size=500,
        epochs=50,
    ),
    Task(
        name="mnist",
        title="classification of MNIST, MLP of two layers of 1000, ReLU",
        place="Figure 4 (right)",
        model_name="MLP 784-1000-1000-10",
        build=lambda: mlp(784, 1000, 1000, 10),
        source=MNIST,
        loss=CLASSIFICATION,
        batch_size=100,
        epochs=100,
    ),
)
