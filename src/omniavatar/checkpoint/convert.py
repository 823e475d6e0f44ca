"""Writes a DiT as one merged file: base, adapter and LoRAs summed, optionally quantised.

Loading that file needs no merge and no float32 copy, and with float8 only a quarter of the base's bytes.
Tensors keep their names; the scales of a float8 weight are stored as `<name>_scale`, one per row. The header
holds the form, the number of heads, and the source files. Tensors are computed and written one at a time.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from omniavatar.checkpoint.dit import FORM_KEY, DiTWeights
from omniavatar.checkpoint.dit_sizes import HEADS_KEY
from omniavatar.checkpoint.finite import require_finite
from omniavatar.checkpoint.layout import TensorEntry
from omniavatar.checkpoint.strict import check_sources
from omniavatar.checkpoint.synthetic import require_space
from omniavatar.checkpoint.tensor_writer import Progress, byte_counter, write_tensors
from omniavatar.errors import OutputError

SOURCES_KEY = "omniavatar.sources"


def convert_dit(
    weights: DiTWeights,
    out: Path,
    *,
    form: str | None,
    made_from: dict[str, object],
    progress: Progress | None = None,
) -> int:
    """Write `weights` to `out` (.safetensors) and return the bytes of its tensors.

    The file appears under its name only when it is complete.

    form: name of the weights' form, None for plain weights.
    made_from: source files as JSON types, stored in the header.
    progress: called with (bytes written, total bytes).

    Raises CheckpointError if the weights do not fit together or are not finite, OutputError for a wrong file
    name or a disk that is too small or read-only.
    """
    if out.suffix != ".safetensors":
        raise OutputError(f"{out}: a converted checkpoint must have the extension .safetensors; rename it")
    check_sources(weights.model, weights.sources, weights.origin)
    model = weights.model.state_dict()
    entries = [TensorEntry(key, weights.sources[key].shape, model[key].dtype) for key in weights.sources]
    total = sum(entry.num_bytes for entry in entries)
    require_space(out.parent, total, "the converted checkpoint")
    metadata = {
        HEADS_KEY: str(weights.model.config.num_heads),
        SOURCES_KEY: json.dumps(made_from, sort_keys=True),
        **weights.metadata,
        **({} if form is None else {FORM_KEY: form}),
    }

    def load(key: str) -> Tensor:
        tensor = weights.sources[key].load().to(model[key].dtype)
        require_finite(key, tensor, weights.sources[key].parts, weights.origin)
        return tensor

    try:
        write_tensors(out, entries, load, metadata, byte_counter(progress, total))
    except OSError as error:
        raise OutputError(
            f"{out}: cannot write the checkpoint ({error.strerror or error}); check the disk and permissions"
        ) from error
    return total
