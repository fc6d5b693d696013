"""What the residuals at a merge are distributed like: sampled, fitted, put in words."""
