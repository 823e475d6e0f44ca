"""File names made from prompts."""

from __future__ import annotations

import re
import unicodedata
from hashlib import sha256


def slugify(text: str, max_len: int = 60) -> str:
    """A file name of 1 to `max_len` ASCII characters `a-z 0-9 -` from any text.

    Accents are dropped, other characters become a dash, and the text is cut between words if possible. A text
    without Latin letters and digits becomes `prompt-` and 8 digits of its hash, so different texts have
    different names.
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
