import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniavatar.sampling.sparsity import (
    MassLevels,
    PlanShape,
    calibrated_plan,
    cut_of_mass,
    dense_plan,
    fewest_blocks,
    mass_levels,
    mass_of,
    nearest_blocks,
    window_plan,
)
from omniavatar.sampling.token_order import row_order, section_of, tile_order

grids = st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20))
sections = st.tuples(st.integers(1, 4), st.integers(1, 10))
GUIDE = (27, 25, 45)


@given(grids, sections)
def test_tile_order_is_a_permutation(grid, section):
    order = tile_order(grid, section)
    assert sorted(order.tokens) == list(range(grid[0] * grid[1] * grid[2]))
    assert (order.tokens[order.places] == np.arange(len(order.tokens))).all()
    assert (order.places[order.tokens] == np.arange(len(order.tokens))).all()
    frame, row, column = order.positions.T
    assert ((frame * grid[1] + row) * grid[2] + column == order.tokens).all()


@given(grids, sections)
def test_the_first_latent_frame_comes_first(grid, section):
    frames = tile_order(grid, section).positions[:, 0]
    assert (frames[: grid[1] * grid[2]] == 0).all()


def test_tokens_stay_in_a_cross_section_and_move_one_column():
    """Consecutive tokens are at most a cross-section apart, except where a strip or a slab ends."""
    positions = tile_order(GUIDE, (2, 8)).positions
    steps = np.abs(np.diff(positions, axis=0))
    assert (steps[:, 2] <= 1).all()
    inside = (steps[:, 0] <= 1) & (steps[:, 1] <= 8)
    assert (~inside).sum() <= 3 * 14


def test_blocks_are_compact():
    """The mean extent of a block of 128 tokens, in frames, rows and columns."""

    def extent(order):
        blocks = np.split(order.positions, range(128, len(order.tokens), 128))
        return np.mean([np.ptp(block, axis=0) + 1 for block in blocks], axis=0)

    tiled, rows = extent(tile_order(GUIDE)), extent(row_order(GUIDE))
    assert tiled[0] < 2.2 and tiled[1] < 8 and tiled[2] < 11
    assert rows[2] > 44


def test_an_order_refuses_an_empty_grid():
    with pytest.raises(ValueError, match="must be positive"):
        tile_order((0, 3, 3))


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@given(st.data(), shapes, st.integers(1, 40), st.integers(1, 9))
def test_a_plan_gives_back_what_was_packed(data, sizes, tokens, block):
    shape = PlanShape(*sizes, (1, 1, tokens), block)
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    masses = generator.dirichlet(np.full(shape.blocks, 0.3), (*sizes, shape.blocks))
    share = data.draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))
    dense = data.draw(st.sets(st.integers(0, shape.steps - 1)))
    plan = calibrated_plan(shape, lambda step, layer: masses[step, layer], share, dense)
    shares = plan.shares()
    for step, layer in itertools.product(range(shape.steps), range(shape.layers)):
        expected = fewest_blocks(masses[step, layer], share)
        if step in dense:
            expected[:] = True
        kept = plan.kept(step, layer)
        if kept is None:
            assert expected.all()
            kept = expected
        assert (kept == expected).all()
        by_token = kept.repeat(block, 1).repeat(block, 2)[:, :tokens, :tokens]
        assert np.allclose(by_token.mean((1, 2)), shares[step, layer])


@given(st.integers(0, 1000), st.integers(1, 12), st.floats(0.01, 1.0))
def test_fewest_blocks_reach_the_share_and_one_less_does_not(seed, blocks, share):
    mass = np.random.default_rng(seed).dirichlet(np.full(blocks, 0.4), (2, 5))
    kept = fewest_blocks(mass, share)
    counts = kept.sum(-1)
    assert (counts >= 1).all()
    reached = np.where(kept, mass, 0).sum(-1)
    assert ((reached >= share - 1e-9) | (counts == blocks)).all()
    smallest = np.where(kept, mass, np.inf).min(-1)
    assert ((reached - smallest < share) | (counts == 1)).all()
    assert (smallest >= np.where(kept, 0, mass).max(-1)).all()


def test_of_equal_blocks_the_earlier_are_kept():
    assert fewest_blocks(np.full((1, 1, 8), 0.125), 0.5).tolist() == [[[True] * 4 + [False] * 4]]


@pytest.mark.parametrize("share", [0.15, 0.35, 0.75, 1.0])
def test_a_window_keeps_its_share_and_the_portrait(share):
    order = tile_order(GUIDE)
    kept = nearest_blocks(order, 128, share, 2.0)
    blocks = len(kept)
    assert blocks == 238
    assert (kept.sum(1) == int(np.ceil(share * blocks))).all()
    assert kept.diagonal().all()
    assert kept[:, :9].all()  # 1,125 tokens of the first latent frame


def test_a_window_is_near_in_time_and_space():
    order = tile_order(GUIDE)
    kept = nearest_blocks(order, 128, 0.2, 2.0)
    middles = np.stack([block.mean(0) for block in np.split(order.positions, range(128, 30375, 128))])
    for query in (20, 120, 237):
        distance = np.linalg.norm((middles - middles[query]) * (2, 1, 1), axis=1)[9:]
        near = kept[query, 9:]
        assert distance[near].max() <= distance[~near].min() + 1e-9


def test_a_small_window_keeps_the_portrait_all_the_same():
    kept = nearest_blocks(tile_order((3, 8, 8)), 16, 0.01, 2.0)
    assert (kept[:4].sum(1) == 4).all()
    assert (kept[4:].sum(1) == 5).all()


def test_window_plan_is_one_table():
    shape = PlanShape(steps=4, layers=30, heads=12, grid=GUIDE, block=128)
    plan = window_plan(shape, tile_order(GUIDE), 0.35, dense_steps=[0])
    assert plan.tables.nbytes == 238 * 30
    assert plan.kept(0, 5) is None
    kept = plan.kept(1, 29)
    assert kept is not None and kept.shape == (12, 238, 238) and (kept == kept[:1]).all()
    shares = plan.shares()
    assert (shares[0] == 1).all()
    assert np.allclose(shares[1:], 0.353, atol=0.002)


def test_dense_plan():
    plan = dense_plan(PlanShape(2, 3, 4, (1, 10, 10), 16))
    assert plan.kept(1, 2) is None
    assert (plan.shares() == 1).all()


@pytest.mark.parametrize(("share", "dense"), [(0.0, ()), (1.1, ()), (0.5, (4,)), (0.5, (-1,))])
def test_impossible_plans(share, dense):
    shape = PlanShape(4, 1, 1, (1, 8, 8), 16)
    with pytest.raises(ValueError):
        window_plan(shape, row_order((1, 8, 8)), share, dense)


def test_masses_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="step 0, layer 0"):
        calibrated_plan(PlanShape(1, 1, 2, (1, 8, 8), 16), lambda step, layer: np.full((1, 4, 4), 0.25), 0.5)


@given(st.integers(0, 1000), st.integers(1, 12), st.floats(0.01, 1.0))
def test_levels_keep_the_mass_and_little_more(seed, blocks, share):
    mass = np.random.default_rng(seed).dirichlet(np.full(blocks, 0.4), (2, 5))
    cut = cut_of_mass(share)
    assert mass_of(cut) >= share - 2e-6
    kept = mass_levels(mass) < cut
    assert (np.where(kept, mass, 0).sum(-1) >= share - 2e-6).all()
    assert (kept >= fewest_blocks(mass, share - 2e-6)).all()
    assert (kept <= fewest_blocks(mass, mass_of(cut) + 1e-9)).all()
    lost, bound = 1 - mass_of(cut), 1 - share
    assert lost >= bound * 0.94 - 2e-6, "a level is 5.6 % of the lost mass"


def test_a_level_plan_shares_its_groups_among_the_sparse_steps():
    shape = PlanShape(5, 2, 3, (1, 8, 8), 16)
    mass = np.random.default_rng(0).dirichlet(np.full(4, 0.3), (2, 2, 3, 4))
    levels = MassLevels(shape, mass_levels(mass))
    plan = levels.plan(7, 2, cut_of_mass(0.6))
    assert plan.shape.steps == 7 and plan.sparse_steps == (2, 3, 4, 5, 6)
    assert (plan.kept(2, 0) == plan.kept(4, 0)).all() and (plan.kept(5, 0) == plan.kept(6, 0)).all()
    for step, group in ((2, 0), (6, 1)):
        for layer in (0, 1):
            assert (plan.kept(step, layer) == (levels.levels[group, layer] < cut_of_mass(0.6))).all()
    assert plan.mass is not None and plan.mass >= 0.6


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.77, 1.0])
def test_the_density_is_met_from_below(density):
    shape = PlanShape(4, 2, 3, (3, 7, 9), 16)
    mass = np.random.default_rng(1).dirichlet(np.full(shape.blocks, 0.3), (1, 2, 3, shape.blocks))
    levels = MassLevels(shape, mass_levels(mass))
    cut = levels.cut_of_density(density)
    plan = levels.plan(4, 1, cut)
    assert plan.kept_share <= density + 1e-6 or cut == 1
    if cut < 256:
        assert levels.plan(4, 1, cut + 1).kept_share > density
    assert plan.step_shares[0] == 1


def test_layers_above_the_limit_run_dense():
    shape = PlanShape(2, 2, 1, (1, 8, 8), 16)
    mass = np.zeros((1, 2, 1, 4, 4))
    mass[:, 0], mass[:, 1] = np.eye(4), 0.25
    plan = MassLevels(shape, mass_levels(mass)).plan(2, 1, cut_of_mass(0.7))
    assert plan.shares()[1, :, 0].tolist() == [0.25, 0.75]
    limited = plan.dense_above(0.7)
    assert limited.kept(1, 1) is None and (limited.kept(1, 0) == plan.kept(1, 0)).all()
    assert limited.digest != plan.digest and plan.dense_above(1.0) is plan
    assert limited.step_shares == (1.0, 0.625)


@pytest.mark.parametrize("block", [1, 2, 7, 8, 16, 32, 64, 100, 128, 256, 4096])
def test_a_cross_section_fits_its_block(block):
    frames, rows = section_of(block)
    assert 1 <= frames * rows <= block
    assert section_of(128) == (2, 8) and section_of(16) == (2, 2)
