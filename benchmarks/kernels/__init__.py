"""The wing of the backend: how fast and how accurate ``apo_kernels`` is."""
