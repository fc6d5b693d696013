"""Products of experts over one weight matrix: forms, tails, modes and their certificates."""
