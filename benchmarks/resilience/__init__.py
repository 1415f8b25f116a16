"""What benchmarks/faults.py measures: one system or question a file."""
