"""The testbed in virtual time: queues, links and clocks of our own, every rule by import from the live system."""
