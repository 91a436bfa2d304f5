"""The optimizer that AdaptiveLR wraps: whether its step is linear in the rate, and how it is taken again."""
