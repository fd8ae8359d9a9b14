"""Checkpoints that the catalogue builds itself: real architecture classes and configurations, seeded weights, own vocabularies.

One module per family, each with `build(name, directory)`; `models.seeded` is the table, and the only one to call them.
"""
