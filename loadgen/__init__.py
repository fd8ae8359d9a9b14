"""Open-loop load: draws arrivals and payloads before a run, sends them on schedule, and reports how many tasks were on time.

`python -m loadgen URL --pipeline NAME=ARRIVALS` runs it against any Open Inference Protocol server. The leaves `arrivals`,
`outcome` and `report` are pure and light, so that the simulator and the orchestrator may import them.
"""
