"""Runs pieces of Python code in forked processes, so that sparsecomm is imported only once.

Reads one JSON request per line. The answer to {"code": text, "output": file} is the process id, and the answer to
{"wait": pid} is the exit code, negative for a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback

from sparsecomm.tools.cli.app import app
from sparsecomm.tools.lab import Lab

NAMES = {"app": app, "Lab": Lab, "os": os}


def child(code: str, output: str) -> None:
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for theirs, ours in ((nowhere, 0), (fd, 1), (fd, 2)):
        os.dup2(theirs, ours)
    # A test suite in the background of a shell ignores Ctrl-C, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        exec(code, NAMES)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        child(request["code"], request["output"])
    print(pid, flush=True)
