"""What `loader.py` measures: the data, the loaders, and each loader in a process of its own."""
