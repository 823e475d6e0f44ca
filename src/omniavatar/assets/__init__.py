"""Inputs of `omniavatar demo`: copies of the portrait and speech in examples/."""
