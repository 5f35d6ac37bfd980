"""
The `voxlm` command, installed as `voxlm_command`: a package of its own, since importing `voxlm_hf` takes seconds, in which an
interrupt must not end in a traceback either.
"""

import os
import signal


def _leave(number, frame):
    os.write(2, b"voxlm: interrupted\n")
    os._exit(128 + number)


def main() -> int:
    """Run the command line of this process; returns its exit code, see `voxlm_hf.app.cli.main`."""
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    from voxlm_hf.app import cli  # here, so that an interrupt meanwhile is one line

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()
