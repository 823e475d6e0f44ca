"""The process that checks inputs for the page: `python -m omniavatar.serve.page.input_process`.

Standard input has pickled pairs of a configuration and a request, standard output a line of JSON for each. It
ends after a while without input, so that its memory is free, and with the process that started it.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import sys
from typing import Any

from omniavatar.config.schema import PipelineConfig
from omniavatar.engine.input_check import InputCheck
from omniavatar.errors import OmniAvatarError

IDLE_S = 120.0


def main() -> None:
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    check: InputCheck | None = None
    known: PipelineConfig | None = None
    while select.select([questions], [], [], IDLE_S)[0]:
        try:
            config, request = pickle.load(questions)
        except EOFError:
            return
        if check is None or config != known:
            check, known = InputCheck(config), config
        answer: dict[str, Any]
        try:
            answer = {"warnings": [[each.about, each.text] for each in check.warnings(request)]}
        except OmniAvatarError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
