"""The command `northstar`: sees to it that the packages which it is made of are ours, then runs it.

A module of its own, as `deploy` may be the package that is somebody else's.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    # Actors are forks of this process (deploy/cluster/forkserver.py): what numpy computes must not depend on its cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    checks = runpy.run_path(str(Path(__file__).with_name("deploy") / "packages.py"))  # by its file, not its name
    try:
        checks["check_packages"](sys.path)  # PYTHONPATH may hold others of these names
        checks["check_installed"]()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    from deploy.cli import main

    main()


if __name__ == "__main__":
    main()
