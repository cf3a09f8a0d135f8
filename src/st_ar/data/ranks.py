"""Several processes that fill one folder, on one machine or on many: they meet in its files and nowhere else."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from st_ar.errors import UserError


@dataclass(kw_only=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1
    timeout: float = 900
    """Seconds without a sign of life from the others before one gives up waiting for them."""
    _last_beat: float = field(default=-float("inf"), init=False)

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As torchrun says in RANK and WORLD_SIZE; without them there is one.

        Raises:
            UserError: they make no sense.
        """
        try:
            rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError as error:
            raise UserError(
                f"RANK and WORLD_SIZE must be numbers ({error}): unset them, or start by torchrun"
            ) from error
        if not 0 <= rank < world:
            raise UserError(f"RANK {rank} must lie in [0, WORLD_SIZE {world}): unset both, or start by torchrun")
        return cls(rank=rank, world=world)

    def share(self, count: int) -> slice:
        """Which of `count` things, a multiple of the ranks, are this one's."""
        each = count // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def beat(self, folder: Path) -> None:
        """Show the others that this one is alive; call it often."""
        now = time.monotonic()
        if self.world > 1 and now - self._last_beat > min(5, self.timeout / 4):
            self._last_beat = now
            self._sign_of_life(folder).write_text(f"{os.getpid()} {now}")

    def wait(self, folder: Path, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Return once `ready`; the others' signs of life in `folder` prolong the wait.

        Args:
            what: says in the error what did not come.

        Raises:
            UserError: no sign of life for `timeout` seconds.
        """
        seen: dict[str, str] = {}
        since = time.monotonic()
        while not ready():
            signs = self._signs_of_others(folder)
            if signs != seen:
                seen, since = signs, time.monotonic()
            if time.monotonic() - since > self.timeout:
                raise UserError(
                    f"rank {self.rank} of {self.world} has waited for {what()}, {self.timeout:.0f} s of it without a sign of "
                    "life from the others: start all ranks by the same command to go on; finished shards are kept"
                )
            if folder.is_dir():
                self.beat(folder)
            time.sleep(min(0.5, self.timeout / 10))

    def clear(self, folder: Path) -> None:
        """Remove everyone's signs of life."""
        for path in folder.glob(".rank-*.partial"):
            path.unlink(missing_ok=True)

    def _sign_of_life(self, folder: Path) -> Path:
        return folder / f".rank-{self.rank:05d}.partial"

    def _signs_of_others(self, folder: Path) -> dict[str, str]:
        signs: dict[str, str] = {}
        for path in folder.glob(".rank-*.partial"):
            if path != self._sign_of_life(folder):
                try:
                    signs[path.name] = path.read_text()
                except OSError:  # just removed by rank 0
                    continue
        return signs
