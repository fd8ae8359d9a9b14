"""The control plane: observe the testbed, decide what should run where, act, and publish the routes."""
