"""What keeps a step or a trial from doing harm."""
