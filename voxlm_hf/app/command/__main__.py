"""`python -m voxlm_command` is the command `voxlm`."""

import sys

from . import main


sys.exit(main())
