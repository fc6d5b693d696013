"""The peak memory in bytes that `poemerge check` announces, before it is rounded for reading.

python -m benchmarks.announced METHOD SETTINGS-AS-JSON BASE EXPERT...
"""

import json
import sys
from pathlib import Path

from poemerge.merging.plan import plan_merge

if __name__ == "__main__":
    method, settings, base, *experts = sys.argv[1:]
    folders = {Path(expert).name: Path(expert) for expert in experts}
    with plan_merge(Path(base), folders, method, json.loads(settings)) as plan:
        print(plan.peak_bytes())
