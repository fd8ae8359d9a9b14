"""`python -m tests.bench.emulated`: as `python -m services.stage`, with the processor `emulated` beside the usual ones."""

from __future__ import annotations

import sys

from services.stage import processors
from services.stage.__main__ import main

if __name__ == "__main__":
    processors.PROCESSORS = {**processors.PROCESSORS, "emulated": "tests.bench.emulated.processor"}
    sys.exit(main())
