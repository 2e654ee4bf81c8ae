"""How many samples each step takes, where that changes in a run: pure functions of the step, and of nothing that happened."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from mtl.errors import UserError


@dataclass(frozen=True)
class BatchSizes:
    """``sizes[k]`` holds from step ``starts[k]`` on; ``starts[0]`` is 0."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def size(self, step: int) -> int:
        """Give how many samples a step takes (steps count from 0)."""
        return self.sizes[bisect_right(self.starts, step) - 1]

    def before(self, step: int) -> int:
        """Give how many samples the steps before this one take: the data's whole state."""
        spans = zip(self.starts, (*self.starts[1:], step), self.sizes, strict=True)
        return sum(size * (min(stop, step) - start) for start, stop, size in spans if start < step)


def constant(size: int) -> BatchSizes:
    """Make the sizes of a run that never changes them."""
    return BatchSizes((0,), (size,))


def by_samples(points: Sequence[tuple[int, int]]) -> BatchSizes:
    """Make sizes from (samples taken before, size) in order: a size holds from the first step that begins with so many taken."""
    starts, sizes = [0], [points[0][1]]
    taken = step = 0
    for at, size in points[1:]:
        steps = ceil(max(at - taken, 0) / sizes[-1])
        taken, step = taken + steps * sizes[-1], step + steps
        if step == starts[-1]:
            sizes[-1] = size
        elif size != sizes[-1]:
            starts.append(step)
            sizes.append(size)
    return BatchSizes(tuple(starts), tuple(sizes))


def by_steps(points: Sequence[tuple[int, int]]) -> BatchSizes:
    """Make sizes from (first step, size) in order."""
    held: dict[int, int] = dict(points)
    return BatchSizes(tuple(held), tuple(held.values()))


def ramp(start: int, increment: int, samples: int, final: int) -> BatchSizes:
    """Grow the batch from ``start`` by ``increment`` at equal distances over ``samples`` samples to ``final``, as Megatron-LM does."""
    if start < 1 or increment < 1 or samples < 1 or start > final or (final - start) % increment:
        raise UserError(
            f"--batch.rampup is {start} {increment} {samples}: expected START INCREMENT SAMPLES, all above 0, where "
            f"--train.global-batch-size ({final}) is START and a whole number of INCREMENTs."
        )
    count = (final - start) // increment
    return by_samples([(0, start)] + [(ceil(i * samples / count), start + i * increment) for i in range(1, count + 1)])


def read_schedule(text: str, unit: str, seq_len: int, final: int) -> BatchSizes:
    """Read `8:1000 16:5000`: 8 samples a step until 1000 steps (samples, tokens) were taken, 16 until 5000, then ``final``."""
    wrong = UserError(
        f"--batch.schedule is {text!r}: expected SIZE:UNTIL pairs such as '8:1000 16:5000', sizes from 1, ends rising; after the last "
        f"end --train.global-batch-size holds. --batch.unit ({unit}) says what is counted."
    )
    points: list[tuple[int, int]] = []
    end = 0
    for pair in text.replace(",", " ").split():
        size, _, until = pair.partition(":")
        try:
            following = int(float(until))
            points.append((end, int(size)))
        except (ValueError, OverflowError):
            raise wrong from None
        if points[-1][1] < 1 or following <= end:
            raise wrong
        end = following
    if not points:
        raise wrong
    points.append((end, final))
    if unit == "steps":
        return by_steps(points)
    return by_samples([(-(-at // seq_len) if unit == "tokens" else at, size) for at, size in points])
