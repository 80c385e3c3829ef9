"""Runs oracles, each in a fork of this process, which has imported torch, transformers and dflash once for all of them.

A fork is as good as a new process: it begins with what the imports left and leaves nothing behind.

in:  one JSON line for each run: {"script": FILE, "arguments": [...], "stderr": FILE that its output is added to}
out: one JSON line for each: {"returncode": n, "cpu_seconds": s}
"""

import json
import os
import runpy
import sys
import traceback
from typing import NoReturn

import checkpoints  # noqa: F401  the imports that all scripts share


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints here prints no reply
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(request["script"], request["arguments"], request["stderr"])
        _, status, usage = os.wait4(child, 0)
        reply = {
            "returncode": os.waitstatus_to_exitcode(status),
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }
        print(json.dumps(reply), file=replies, flush=True)


def run(script: str, arguments: list[str], stderr: str) -> NoReturn:
    """Becomes the script, as `python SCRIPT ARGUMENTS` would, and ends."""
    output = os.open(stderr, os.O_WRONLY | os.O_APPEND)
    for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(file, number)
    sys.argv = [script, *arguments]
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
