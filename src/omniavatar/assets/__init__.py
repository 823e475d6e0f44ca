"""What `omniavatar demo` runs on: copies of examples/portrait.png, examples/speech.flac, configs/nano.yaml."""
