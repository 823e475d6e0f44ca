"""The order in which the test run begins with its longest files."""

from pathlib import Path

UNIT = Path(__file__).parent / "unit"
LONGEST_FIRST = (
    "serve/test_ray.py",
    "assets/test_pocket_trained.py",
    "serve/page/test_page.py",
    "engine/test_resume.py",
    "serve/test_group.py",
    "cli/test_batch_cli.py",
    "test_fuzz.py",
    "plan/test_placement.py",
    "cli/test_ranks.py",
    "media/test_h264.py",
    "docs/test_commands.py",
    "live/test_command.py",
    "engine/test_pipeline.py",
    "cli/test_process.py",
    "serve/jobs/test_nano_jobs.py",
    "media/test_sound_matrix.py",
    "benchmarks/test_starting.py",
    "live/test_makers.py",
    "measure/test_calibrate.py",
    "accel/test_decode_in_pieces.py",
    "live/test_session.py",
    "live/test_page.py",
    "training/test_handover.py",
    "engine/test_causal_video.py",
    "serve/jobs/test_workers.py",
    "assets/test_pocket_package.py",
    "accel/test_offload.py",
    "engine/test_service.py",
    "measure/test_deadline.py",
    "cli/test_edge.py",
    "docs/test_notebook.py",
    "training/test_nets.py",
    "accel/test_decoders.py",
    "cli/test_few_steps.py",
    "serve/jobs/test_claims.py",
    "docs/test_examples.py",
)
"""Files that take longest, by processor time and waiting. A worker gets whole files, and these ones first, so
that none of them runs alone at the end."""
