"""The `voxlm` command. Its libraries take seconds to load, in which an interrupt must not end in a traceback either."""

import os
import signal
import sys


def _leave(number, frame):
    os.write(2, b"voxlm: interrupted\n")
    os._exit(128 + number)


def main() -> int:
    """Run the command line of this process; returns its exit code, see `voxlm_hf.app.cli.main`."""
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    from voxlm_hf.app import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
