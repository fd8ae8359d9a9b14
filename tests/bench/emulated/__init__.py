"""A testbed of boxes with processors of their own, on a machine with two: real gateway, stages and orchestrator, emulated work.

Replicas of real models would share this machine's processors, and what is measured would be how these are shared. Here a
stage's work is a wait whose length is drawn from a stated law, so that a replica more is capacity more, as on another box.
"""
