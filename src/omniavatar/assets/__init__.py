"""What `omniavatar demo` runs on: copies of the portrait and speech of examples/ and of configs/nano.yaml."""
