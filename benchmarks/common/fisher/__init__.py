"""Kronecker factors of the Fisher matrix: of which layers, how they are captured, how they are damped."""
