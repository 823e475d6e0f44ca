import json

from omniavatar.sampling.cache_constants import TEACACHE_POLYNOMIALS
from omniavatar.sampling.step_cache import relative_changes, teacache_plan


def test_every_recorded_decision(golden):
    """Without the guard, which the original code does not have, every skip decision equals the recording."""
    tensors, metadata = golden("teacache.safetensors")
    recorded = json.loads(metadata["skip"])
    assert recorded
    for name, skips in recorded.items():
        model, steps, threshold = name.split("/")
        distances = relative_changes(tensors[f"modulation_{steps}"].numpy())
        polynomial = TEACACHE_POLYNOMIALS[model.removeprefix("Wan2.1-T2V-")]
        plan = teacache_plan(distances, polynomial, float(threshold), guard=False)
        assert [not compute for compute in plan.compute] == skips, name
