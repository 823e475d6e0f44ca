"""What `omniavatar demo` runs on: copies of the portrait and speech of examples/."""
