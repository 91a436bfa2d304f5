"""Front ends of Amortized Proximal Optimization on the apo_kernels backend."""
