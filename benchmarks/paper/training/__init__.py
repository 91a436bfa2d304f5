"""Training a task: optimizers by name, the loop with its checkpoint, curves, the search of hyperparameters."""
