"""One app for every stage: queue, batch, compute, forward. What it computes is the manifest's choice."""
