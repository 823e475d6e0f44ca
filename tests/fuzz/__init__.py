"""Fuzzing of every reader of files from outside: `make fuzz`, and a short seeded run in `make test`."""
