"""Making it so: runtimes behind `orchestrator.core.Runtime`, over one pure `reconcile`."""
