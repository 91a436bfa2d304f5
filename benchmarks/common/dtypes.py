"""The dtypes that are measured and trained in, by the short names that files and options use."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORT_NAMES = {torch.float64: "fp64", **{dtype: name for name, dtype in DTYPES.items()}}
