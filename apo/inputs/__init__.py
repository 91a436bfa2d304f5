"""The batches B′: where they lie, and which of their positions count."""
