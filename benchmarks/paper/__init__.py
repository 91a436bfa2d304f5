"""The paper's tasks, trained by ``apo``'s optimizers and by strong baselines."""
