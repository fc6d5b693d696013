"""Pictures of a report: numbers and a theme in, a matplotlib figure out."""
