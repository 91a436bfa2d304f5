"""The model's matrices with their preconditioners, one by one and as one operator."""
