"""The constants of step caches, and those that their authors published for plain Wan 2.1 T2V.

The published ones were fitted without OmniAvatar's audio, image latent and LoRA, so they are a starting
point. Constants measured on the model itself (`omniavatar calibrate`) are better. Keys are model sizes.
Sources: TeaCache (arXiv 2411.19108), `use_ret_steps` rows for Wan 2.1, highest power first; MagCache
(arXiv 2506.09045), 50-step magnitude ratios of the conditional branch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class CacheConstants:
    """The constants of TeaCache and MagCache.

    - source: where they come from, for people.
    - magnitude_ratios: MagCache's, one for each step of the calibrated run; the first is 1.
    - polynomial: TeaCache's, highest power first.
    - fitted: time changes (low, high) that the polynomial was fitted on; None if unknown.
    """

    source: str
    magnitude_ratios: tuple[float, ...]
    polynomial: tuple[float, ...]
    fitted: tuple[float, float] | None = None

    @property
    def digest(self) -> str:
        """Hash of the numbers, not of the source: equal for constants that give equal plans."""
        numbers = (self.magnitude_ratios, self.polynomial, self.fitted)
        return hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]


TEACACHE_POLYNOMIALS: dict[str, tuple[float, ...]] = {
    "1.3B": (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    "14B": (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
}

# fmt: off
MAGCACHE_RATIOS: dict[str, tuple[float, ...]] = {
    "14B": (
        1, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434, 0.99533,
        0.99468, 0.99438, 0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347, 0.99418,
        0.99271, 0.99313, 0.99215, 0.99218, 0.99216, 0.99163, 0.99138, 0.98982, 0.98996, 0.9887,
        0.98772, 0.98767, 0.98573, 0.98501, 0.9838, 0.98177, 0.98037, 0.97678, 0.97546, 0.97184,
        0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693, 0.8796, 0.86111,
    ),
    "1.3B": (
        1, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957, 0.99511,
        0.99535, 0.99552, 0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415, 0.99419,
        0.99396, 0.99388, 0.99349, 0.99309, 0.9927, 0.99228, 0.99171, 0.99137, 0.99068, 0.99005,
        0.98944, 0.98849, 0.98758, 0.98644, 0.98504, 0.9836, 0.98202, 0.97977, 0.97717, 0.9741,
        0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241, 0.86821, 0.81838,
    ),
}
# fmt: on


def published_constants(scale: str | None) -> CacheConstants | None:
    """Constants published for the model size `scale`, None if none are published."""
    if scale not in MAGCACHE_RATIOS:
        return None
    source = f"published for plain Wan 2.1 {scale}; `omniavatar calibrate` measures this model's own"
    return CacheConstants(source, MAGCACHE_RATIOS[scale], TEACACHE_POLYNOMIALS[scale])
