"""Order, parameters and the command line; no tensor, no arithmetic."""
