"""What both wings share: the console, results files, tables, timing, the machine, and the loop that takes steps."""
