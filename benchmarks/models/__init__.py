"""The networks of the paper's experiments. A file an architecture; each names the published count of parameters."""

from benchmarks.models.mlp import autoencoder, linear_network, mlp

__all__ = ["autoencoder", "linear_network", "mlp"]
