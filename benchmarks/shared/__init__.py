"""What several benchmarks use: options, timing, reports, inputs."""
