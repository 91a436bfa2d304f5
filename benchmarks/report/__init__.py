"""The paper's tables and figures with our figures in them, from result files alone."""
