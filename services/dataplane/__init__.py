"""The rules and the wire contract of the data plane: pure functions of data, with time and randomness as arguments.

A shared leaf: the gateway and the stage call it live, the orchestrator and the simulator import the same functions. Nothing
here imports a clock, asyncio or an HTTP library.
"""
