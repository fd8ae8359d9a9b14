"""What the testbed is doing: sources of signals behind `orchestrator.core.Telemetry`."""
