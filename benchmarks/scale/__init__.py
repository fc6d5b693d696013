"""Plans of merges that nobody has done."""
