"""What poemerge is measured against, and how: see README.md."""

import os

# Before torch is imported: spinning threads are many times slower on a machine in use, on any side.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
