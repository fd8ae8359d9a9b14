"""The one door to transformers: offline, and quiet."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Use transformers within: nothing is looked up in the network, and neither progress bars nor warnings are printed."""
    # Read once, when huggingface_hub is first imported. The files are local by now: a look-up could only be slow or fail.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside transformers and torch are not ours to mend
        from transformers.utils import logging  # noqa: PLC0415

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        yield
