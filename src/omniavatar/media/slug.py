"""File names made from prompts."""

from __future__ import annotations

import re
import unicodedata
from hashlib import sha256


def slugify(text: str, max_len: int = 60) -> str:
    """A file name of at most `max_len` ASCII characters `a-z 0-9 -` from any text, never empty.

    Accents are dropped, anything else becomes a dash, and the cut falls between words where it can.
    A text without a Latin letter or digit gives `prompt-` and 8 digits of its hash, so that different
    texts keep different names.
    """
    if max_len < 1:
        raise ValueError("max_len must be at least 1")
    decomposed = unicodedata.normalize("NFKD", text)
    ascii_text = decomposed.encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")
    if not slug:
        slug = "prompt-" + sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    if len(slug) <= max_len:
        return slug
    cut = slug[: max_len + 1].rpartition("-")[0]
    return cut if len(cut) > max_len // 2 else slug[:max_len].strip("-")
