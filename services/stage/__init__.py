"""One app for every stage: queue, batch, compute, forward. What it computes is the manifest's choice."""

import os

# Before anybody imports numpy: its matrix products would take every core of the host, whatever the quota, for a head's few.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
