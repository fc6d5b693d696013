"""The way of an extraction: read, subtract, truncate, write."""
