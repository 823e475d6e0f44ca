"""The parts of the `pocket_quality` benchmark: test clips, videos, face landmarks, figures."""
