"""What selection knows of a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """What selection knows of a GPU."""

    arch: int  # 90 for compute capability 9.0
    multiprocessors: int
    shared_bytes: int  # that one block may have
    multiprocessor_shared_bytes: int
    threads: int  # that a multiprocessor holds

    @property
    def clusters(self) -> bool:
        """Whether blocks can read each other's shared memory."""
        return self.arch >= 90

    def placed(self, cluster: int, resident: int) -> int:
        """How many blocks run at once, in clusters of so many, where a multiprocessor holds `resident` of them.

        The multiprocessors of a cluster are of one processing cluster of the GPU, which not every size fills. The
        H100's 132 hold 66, 39, 30, 22, 17, 15, 15 of 2 to 8 blocks, by cuOccupancyMaxActiveClusters.
        """
        share = {1: 1.0, 2: 1.0, 3: 0.886, 4: 0.91, 5: 0.834, 6: 0.773, 7: 0.796, 8: 0.91}[cluster]
        return int(self.multiprocessors * resident * share) // cluster * cluster
