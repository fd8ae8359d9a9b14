"""How many replicas there should be: policies behind `orchestrator.core.ScalingPolicy`."""
