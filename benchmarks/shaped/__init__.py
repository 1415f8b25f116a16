"""What `network.py` runs on each of its hosts."""
