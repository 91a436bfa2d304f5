"""Throughput of the operator, its derivatives and the whole step, against plain torch and KFAC, on named models."""
