"""One script per question; each prints a table and can write JSON and check its claims."""
