"""What a training loop does around a step: GradScalers, accumulation, checkpoints, parameters that change."""
