"""Which token comes next: greedy, or drawn from the likeliest ones. Pure numpy; the randomness is an argument."""

from __future__ import annotations

import numpy as np

from services.dataplane.wire import Array


def choose(logits: Array, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """The next token of one sequence.

    Args:
        logits: (vocabulary,) float32; -inf for what may not come.
        temperature: divides the logits; 0 takes the likeliest token, the first of equals, and draws nothing.
        top_p: drawn from the likeliest tokens that together have at least this probability (nucleus sampling; Holtzman et al.
            2020, section 3.1); 1 takes all.
        rng: of this sequence alone, so that its tokens do not depend on who else is in the batch.
    """
    if temperature <= 0.0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")
    scaled = (logits[order].astype(np.float64) - float(logits[order[0]])) / temperature
    probabilities = np.exp(scaled)
    reached = np.cumsum(probabilities)
    total = reached[-1]
    # The token with which the share is reached still counts, so at least one is left.
    count = int(np.searchsorted(reached, top_p * total, side="left")) + 1 if top_p < 1.0 else len(reached)
    count = min(count, len(reached))
    drawn = rng.random() * reached[count - 1]
    return int(order[min(int(np.searchsorted(reached[:count], drawn, side="right")), count - 1)])
