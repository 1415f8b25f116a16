"""Search for the layer groups to train, by validation score at a fraction of the grid's cost."""
