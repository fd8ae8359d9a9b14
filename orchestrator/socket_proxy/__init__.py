"""The orchestrator's only way to the Docker socket: a proxy that lets pass the calls it needs, and refuses every other."""
