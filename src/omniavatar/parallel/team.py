"""`Team`: the interface of the main path to the processes that make one video together.

`ONE` is a single process, for which every method does nothing. Otherwise rank 0 is the leader: it alone reads
inputs, decides and writes. The other ranks wait for its orders (`AvatarPipeline.follow`; Python objects, only
between videos) and run the same loop of windows, in which only tensors are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from omniavatar.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from omniavatar.model.attention import AttentionFn
    from omniavatar.model.dit import RunBlocks, WanDiT
    from omniavatar.parallel.guidance import Predict
    from omniavatar.parallel.peers import Peers
    from omniavatar.parallel.picture_rows import PictureRows
    from omniavatar.parallel.rank_layout import Layout
    from omniavatar.sampling.passes import Pass, Passes

Exchange = Literal["auto", "direct", "collective"]
StepVelocities: TypeAlias = "Callable[[Sequence[Pass], Predict, Tensor], Iterable[Tensor]]"


class Team(Protocol):
    """The processes of one video.

    leads: whether this process reads inputs and writes the video.
    """

    @property
    def size(self) -> int: ...

    @property
    def leads(self) -> bool: ...

    def arrange(self, layout: Layout, exchange: Exchange = "auto") -> str | None:
        """Form the groups. All ranks call it once, before the methods below.

        Returns the chosen exchange and the reason, as text; None for one process.

        exchange: direct (`parallel.direct`), collective, or auto: direct if the GPUs involved can access each
        other, decided separately for attention and for the borders in the VAE.

        Raises ResourceError if direct is not possible.
        """

    @property
    def captures(self) -> bool:
        """Whether the exchanges inside a forward can be captured in a CUDA graph."""

    def apply(self, dit: WanDiT) -> None:
        """Make self-attention span the ranks of a forward; call it after other optimisations, before
        offloading."""

    def shard(self, run_blocks: RunBlocks) -> RunBlocks:
        """A function that runs `run_blocks` on this rank's tokens.

        A step cache must be inside `run_blocks`, because its residuals belong to the tokens of one rank.
        """

    def spread(self, attention: AttentionFn) -> AttentionFn:
        """Attention over the tokens of this rank, computed by `attention` over the tokens of all ranks."""

    def own_heads(self, heads: int) -> slice:
        """The heads, out of all, that `attention` in `spread` gets."""

    def velocities(self, passes: Passes) -> StepVelocities:
        """A function that returns the velocities of a step's passes."""

    def share(self, values: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The leader's float32 `values` on every rank; the other ranks pass None."""

    def order(self, what: Any) -> None:
        """Send an order to the other ranks; only the leader calls it."""

    def next_order(self) -> Any:
        """The next order of the leader; only the other ranks call it."""

    def stops(self, stop: bool | None) -> bool:
        """The leader's `stop` on every rank; the other ranks pass None."""

    def meet(self) -> None:
        """Wait for all ranks, without a time limit."""

    def picture_rows(self, rows: int) -> PictureRows | None:
        """This rank's run in a picture of `rows` latent rows; None if every rank computes all rows."""

    def weight_peers(self) -> Peers | None:
        """The ranks that can share weights, because they run the same blocks in the same order."""


class OneProcess:
    """A team of one process."""

    size = 1
    leads = True
    captures = True

    def arrange(self, layout: Layout, exchange: Exchange = "auto") -> str | None:
        return None

    def apply(self, dit: WanDiT) -> None:
        pass

    def shard(self, run_blocks: RunBlocks) -> RunBlocks:
        return run_blocks

    def spread(self, attention: AttentionFn) -> AttentionFn:
        return attention

    def own_heads(self, heads: int) -> slice:
        return slice(heads)

    def velocities(self, passes: Passes) -> StepVelocities:
        return _predict_all

    def share(self, values: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
        assert values is not None
        return values

    def order(self, what: Any) -> None:
        pass

    def next_order(self) -> Any:
        return None

    def stops(self, stop: bool | None) -> bool:
        return bool(stop)

    def meet(self) -> None:
        pass

    def picture_rows(self, rows: int) -> PictureRows | None:
        return None

    def weight_peers(self) -> Peers | None:
        return None


def _predict_all(row: Sequence[Pass], predict: Predict, like: Tensor) -> Iterator[Tensor]:
    return map(predict, row)


ONE = OneProcess()


def check_size(team: Team, processes: int) -> None:
    """Raise ConfigError unless the team has this number of processes."""
    if team.size != processes:
        raise ConfigError(
            f"sp_size, cfg_parallel: {processes} processes are configured, but {team.size} runs; start them "
            f"with torchrun --nproc_per_node={processes} or `generate --gpus`, or set both to 1"
        )
