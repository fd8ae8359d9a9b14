"""Where replicas go: pure functions from demand and nodes to a placement."""
