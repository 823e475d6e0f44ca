"""One merged file of a DiT in the form it runs in: base, adapter and LoRAs summed, float8 where asked.

Loading it needs no merge, no float32 copy and, in float8, a quarter of the base's bytes. Tensors keep their
names; a float8 weight has its scales beside it (`<name>_scale`, one a row). The header says the form, the
number of heads, and what the file was made from. Tensors are made and written one at a time.
"""

from __future__ import annotations

import json
from pathlib import Path

from omniavatar.checkpoint.dit import FORM_KEY, HEADS_KEY, DiTWeights
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
    """Write `weights` to `out` (.safetensors), which appears when it is whole. Returns its tensors' bytes.

    form: name of the weights' form, None for plain ones. made_from: JSON-able, kept in the header.
    progress: called with (bytes written, bytes in all). Raises CheckpointError for weights that do not fit
    together, OutputError for a wrong name or a disk that is too small or not writable.
    """
    if out.suffix != ".safetensors":
        raise OutputError(f"{out}: a converted checkpoint is one .safetensors file; name it so")
    check_sources(weights.model, weights.sources, weights.origin)
    model = weights.model.state_dict()
    entries = [TensorEntry(key, weights.sources[key].shape, model[key].dtype) for key in weights.sources]
    total = sum(entry.num_bytes for entry in entries)
    require_space(out.parent, total, "the converted checkpoint")
    metadata = {
        HEADS_KEY: str(weights.model.config.num_heads),
        SOURCES_KEY: json.dumps(made_from, sort_keys=True),
        **({} if form is None else {FORM_KEY: form}),
    }
    try:
        write_tensors(
            out, entries, lambda key: weights.sources[key].load(), metadata, byte_counter(progress, total)
        )
    except OSError as error:
        raise OutputError(f"{out}: cannot write the checkpoint ({error.strerror or error})") from error
    return total
