"""What looks at the kernels from outside: what they cost by shape (:mod:`~apo_kernels.triton.tools.cost_model`), and
what they compile to for every GPU (:mod:`~apo_kernels.triton.tools.compile_ahead`), for NVIDIA's down to the
instructions (:mod:`~apo_kernels.triton.tools.disassembly`)."""
