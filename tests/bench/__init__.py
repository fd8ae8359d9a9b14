"""`make bench`: what Espalier costs and what it keeps, measured in one run and printed as ratios.

Not collected by pytest: nothing here passes or fails by the clock. `__main__` runs the measurements one after another, each
in its own module, and writes out/bench/report.json.
"""
