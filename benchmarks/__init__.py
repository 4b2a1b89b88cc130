"""One script a table; ``python -m benchmarks NAME`` runs it."""
