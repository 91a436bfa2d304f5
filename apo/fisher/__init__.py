"""The Fisher matrix by sampled gradients: the start of P, and how P compares with the inverse."""
