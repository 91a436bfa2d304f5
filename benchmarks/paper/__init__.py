"""The wing of the paper: its tasks, trained by ``apo``'s optimizers and by strong baselines."""
