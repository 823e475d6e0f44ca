"""The project's benchmarks, one a file. `python -m benchmarks` lists them."""
