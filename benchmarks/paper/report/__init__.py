"""The paper's tables and figures with our figures in them, made from results files alone."""
