"""The data plane: a gateway that walks each task through its stages, and the stage that serves any of them."""
