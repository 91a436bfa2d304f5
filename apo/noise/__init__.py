"""Steps where gradients are noisy."""
