"""How fast and how accurate ``apo_kernels`` is."""
