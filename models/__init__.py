"""A Hugging Face model becomes stages: exported, verified against the whole model, and profiled.

`manifest` is the leaf that the rest of the house may read; everything else here may import torch and runs only at export time.
"""
