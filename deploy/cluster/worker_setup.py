"""What Ray starts a worker by, in place of its own setup_worker.py: the same, without importing Ray to that end.

    python worker_setup.py --language=PYTHON --serialized-runtime-env-context={…} program argument…

A program of its own, without packages. Ray's own takes half a second of a core, before each worker.
"""

import json
import os
import shlex
import sys

CONTEXT, LANGUAGE = "--serialized-runtime-env-context", "--language"


def main(*given: str) -> None:
    options = dict(word.split("=", 1) for word in given if word.startswith((f"{CONTEXT}=", f"{LANGUAGE}=")))
    program = [word for word in given if word.partition("=")[0] not in options]
    context = json.loads(options.get(CONTEXT) or "{}")
    executable, environment = context.pop("py_executable", ""), context.pop("env_vars", {})
    if options.get(LANGUAGE) != "PYTHON" or not executable or any(context.values()):  # more than we know of
        rays = os.path.join(os.path.dirname(program[0]), "setup_worker.py")
        os.execv(sys.executable, [sys.executable, rays, *given])
    os.environ.update({name: os.path.expandvars(value) for name, value in environment.items()})
    call = shlex.split(executable)
    os.execv(call[0], [*call, *program])


if __name__ == "__main__":
    main(*sys.argv[1:])
