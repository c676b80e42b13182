"""Run code in a process of its own"""

import os
import subprocess
import sys


def printed(
    code: str,  # Python
    hash_seed: int,  # decides the order of sets and the hashes of texts
    stdin: str = "",
) -> str:
    "What code prints in a new process with another hash seed"
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-c", code],
        input=stdin,
        env=os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
