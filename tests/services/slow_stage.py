"""`python -m tests.services.slow_stage DIRECTORY`: the decoder written by hand, as a process that takes a while for each token.

Prints its address. For tests that end it in the middle of an answer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from services import server
from services.dataplane.wire import Array
from services.stage.app import build
from tests.services import generative
from tests.services.generative import Paced

TOKEN_S = 0.1


class Slow(Paced):
    """Sleeps before every run once the warm-up is over."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        self.runs += 1
        if self.runs > 20:
            time.sleep(TOKEN_S)
        return super().run(inputs, outputs)


def main() -> None:
    spec, processor, _ = generative.generator(Path(sys.argv[1]), kind=Slow)
    replica = generative.replica(spec, processor, "generate")
    listener = server.listen("127.0.0.1", 0)
    server.serve(build(replica), replica, listener, grace_s=0.1, announce=lambda url: print(url, flush=True))


if __name__ == "__main__":
    main()
