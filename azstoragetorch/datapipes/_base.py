"""Base classes of the pipes: torch's DataPipes or, in a torch without them, small classes of this package."""

from __future__ import annotations

from typing import Any

try:
    from torch.utils.data import IterDataPipe, functional_datapipe
    from torch.utils.data.datapipes.iter import Batcher, Collator, IterableWrapper, Mapper
    from torch.utils.data.datapipes.iter.sharding import SHARDING_PRIORITIES
    from torch.utils.data.datapipes.utils.common import (
        StreamWrapper,
    )
    from torch.utils.data.datapipes.utils.common import (
        _check_unpickable_fn as check_function,  # torch's own words for a function that workers cannot be sent
    )
    from torch.utils.data.graph import DataPipeGraph, traverse_dps
    from torch.utils.data.graph_settings import apply_random_seed, apply_sharding, get_all_graph_pipes
except ImportError:
    from azstoragetorch.datapipes._standin import (  # type: ignore[assignment]
        SHARDING_PRIORITIES,
        DataPipeGraph,
        IterableWrapper,
        IterDataPipe,
        StreamWrapper,
        apply_random_seed,
        apply_sharding,
        check_function,
        functional_datapipe,
        get_all_graph_pipes,
        own_share,
        traverse_dps,
    )
    from azstoragetorch.datapipes._standin_pipes import Batcher, Collator, Mapper  # type: ignore[assignment]
else:
    from azstoragetorch._samples.workers import Placement

    def own_share(pipe: Any, placement: Placement) -> tuple[int, int]:  # noqa: ARG001 - the stand-in needs it
        """All of it: torch's DataLoader calls `apply_sharding`."""
        return 1, 0


__all__ = [
    "SHARDING_PRIORITIES",
    "Batcher",
    "Collator",
    "DataPipeGraph",
    "IterDataPipe",
    "IterableWrapper",
    "Mapper",
    "StreamWrapper",
    "apply_random_seed",
    "apply_sharding",
    "check_function",
    "functional_datapipe",
    "get_all_graph_pipes",
    "own_share",
    "traverse_dps",
]
