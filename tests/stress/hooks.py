"""Lets Schemathesis reach what lies behind the checks: half of its requests and ids become good ones."""

from __future__ import annotations

import base64
import os
import random
from typing import Any

import schemathesis

from serve_api import portrait, voice

IDS = "STRESS_VIDEO_IDS"
"""Environment variable with the ids of finished videos, separated by commas."""
REAL = {"input_reference": portrait(), "audio_reference": voice()}
URLS = {name: f"data:x/y;base64,{base64.b64encode(data).decode()}" for name, data in REAL.items()}


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Half of the requests become good ones with at most one of the generated fields."""
    files = [body[name] for name in REAL if name in body] if isinstance(body, dict) else []
    if not files or random.random() < 0.5:
        return body
    others = [name for name in body if name not in (*REAL, "prompt")]
    chosen = random.sample(others, min(len(others), random.randrange(2)))
    good: dict[str, Any] = REAL if isinstance(files[0], bytes | bytearray) else URLS
    return {"prompt": "x", **good, **{name: body[name] for name in chosen}}


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    if isinstance(path_parameters, dict) and "video_id" in path_parameters and random.random() < 0.5:
        path_parameters["video_id"] = random.choice(os.environ[IDS].split(","))
    return path_parameters
