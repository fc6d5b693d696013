"""Sources and results that lie elsewhere: object storage, and what else fsspec knows by a URL."""
