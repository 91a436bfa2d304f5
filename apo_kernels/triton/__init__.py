"""The Triton backend: a whole model's preconditioning in a handful of launches.

* :mod:`~apo_kernels.triton.table_layout`: the tables that every kernel reads, column by column;
* :mod:`~apo_kernels.triton.primitives`: device functions that the kernels share;
* :mod:`~apo_kernels.triton.tile`: one program for each ``b × b`` tile, the whole chain on chip;
* :mod:`~apo_kernels.triton.tile_model`, :mod:`~apo_kernels.triton.tile_slopes`: the same for a bound model's steps and
  trials, and for its slopes;
* :mod:`~apo_kernels.triton.model_parts`: where tiles of a bound model lie, and their loads and stores;
* :mod:`~apo_kernels.triton.model`, :mod:`~apo_kernels.triton.model_plan`, :mod:`~apo_kernels.triton.model_layers`,
  :mod:`~apo_kernels.triton.model_wide`: their host's side;
* :mod:`~apo_kernels.triton.relative`, :mod:`~apo_kernels.triton.relative_steps`: relative steps, and their host's side;
* :mod:`~apo_kernels.triton.gemm`: the grouped GEMM for wider blocks, stage by stage;
* :mod:`~apo_kernels.triton.gemm_product`: where its tiles lie, their product, and their loads and stores;
* :mod:`~apo_kernels.triton.pack`: operands brought into aligned, zero-padded form;
* :mod:`~apo_kernels.triton.config`: tile sizes and warps, as pure functions;
* :mod:`~apo_kernels.triton.layers`, :mod:`~apo_kernels.triton.plan`: the host's side, built once for a list of layers;
* :mod:`~apo_kernels.triton.plan_builder`, :mod:`~apo_kernels.triton.operand_table`: what a plan is made of;
* :mod:`~apo_kernels.triton.graphs`: what a captured graph reads, kept as long as the graph;
* :mod:`~apo_kernels.triton.errors`: why a call isn't served;
* :mod:`~apo_kernels.triton.tools`: what looks at the kernels from outside;
* :mod:`~apo_kernels.triton.backend`: what :mod:`apo_kernels.dispatch` calls.

Importing this package alone imports no Triton: ``config`` and ``table_layout`` are plain Python.
"""
