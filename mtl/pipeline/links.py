"""Messages between the stages of a pipeline: receives posted ahead, sends that overlap with compute, buffers used again.

Every pair of devices has a channel for each direction. On it messages go in the order in which the table makes them, and both ends know
that order, so nothing is negotiated and no send waits for a receive that is posted after it.

A receive is posted early, but not before everything of this device that its message comes from has been launched. On a GPU whatever waits
for the whole device (memory taken or a kernel loaded for the first time) waits for posted receives too: these must come by themselves.
"""

import re
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtl.errors import PeerLost
from mtl.kernels.mailbox import Mailbox, mailbox
from mtl.pipeline.mail import Mail
from mtl.pipeline.table import Action, Table, after
from mtl.sharding.mesh import Mesh

AHEAD = 2
"""Receives that are posted on each channel before they are needed."""

TAGGED = ("cpu",)
"""Devices whose channels share one group, told apart by tags; NCCL knows no tags."""

Channel = tuple[int, int]


class Links:
    """The channels of this device's pipeline. On the CPU they share the pipeline's group and messages have tags."""

    def __init__(self, mesh: Mesh, place: Mapping[int, int], engine: bool = False) -> None:
        """Make the channels between stages that follow each other; every process must call this. With ``engine`` GPUs copy messages."""
        self.device = mesh.coordinates["pipe"]
        self._groups: dict[Channel, Any] = {}
        self.tagged = mesh.device_type in TAGGED
        self._free: dict[Any, list[Tensor]] = {}
        self._box: Mailbox | None = None
        pairs = {(place[s], place[s + 1]) for s in range(len(place) - 1)}
        channels = sorted(c for a, b in pairs if a != b for c in ((a, b), (b, a)))
        if self.tagged:
            self._groups = dict.fromkeys(channels, mesh.device_mesh.get_group("pipe") if channels else None)
            return
        if engine:
            group = mesh.device_mesh.get_group("pipe").group_name
            self._box = mailbox(group, tuple(tuple(a for a, b in channels if b == d) for d in range(mesh.shape.pipe)))
            return
        names, ranks = list(mesh.device_mesh.mesh_dim_names or ()), mesh.device_mesh.mesh
        lines = ranks.movedim(names.index("pipe"), -1).reshape(-1, mesh.shape.pipe).tolist() if channels else []
        for channel in channels:  # a group each, so that on NCCL each has a stream of its own
            for line in lines:
                group = dist.new_group([line[channel[0]], line[channel[1]]])
                if dist.get_rank() in line and self.device in channel:
                    self._groups[channel] = group
        self._connect(mesh.device_type)

    def _connect(self, device_type: str) -> None:
        """Send a word on every channel, in one order everywhere: the first message of a group holds up both processes until they meet."""
        for channel in self._groups:
            self.post(channel, torch.zeros(1, device=device_type), 0).wait()

    def open(self, table: Table, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "Traffic | Mail":
        """Start a step's messages, all of one shape."""
        return Traffic(self, table, shape, dtype, device) if self._box is None else Mail(self._box, table, self.device, shape, dtype)

    def take_buffer(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Take a buffer that is free, or a new one."""
        free = self._free.setdefault((shape, dtype, device), [])
        return free.pop() if free else torch.empty(shape, dtype=dtype, device=device)

    def return_buffer(self, buffer: Tensor) -> None:
        """Keep a buffer for later messages."""
        self._free.setdefault((tuple(buffer.shape), buffer.dtype, buffer.device), []).append(buffer)

    def post(self, channel: Channel, x: Tensor, tag: int) -> Any:
        """Start to send ``x`` on a channel out, or to receive into it on a channel in."""
        group, out = self._groups[channel], channel[0] == self.device
        other = channel[1] if out else channel[0]
        if not self.tagged:
            other, tag = sorted(channel).index(other), 0
        call = dist.isend if out else dist.irecv
        return call(x, group=group, tag=tag, **({"group_dst": other} if out else {"group_src": other}))


class Traffic:
    """The messages of one run of a table."""

    def __init__(self, links: Links, table: Table, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Post the first receives."""
        self._links, self._table, self._form = links, table, (shape, dtype, device)
        self._posted: dict[Action, tuple[Any, Tensor]] = {}
        self._sent: list[tuple[Any, Tensor, Action]] = []
        self._after, self._launched = after(table, links.device), 0
        self._coming = {channel: deque(goals) for channel, goals in table.messages().items() if channel[1] == links.device}
        self.launched(0)

    def launched(self, actions: int) -> None:
        """Post what may come now that so many of this device's actions have been launched."""
        self._launched = actions
        for channel in self._coming:
            self._top_up(channel)

    def send(self, x: Tensor, goal: Action) -> None:
        """Send a result on its way."""
        self._sent = [entry for entry in self._sent if not entry[0].is_completed()]
        channel = (self._links.device, self._table.place[goal.stage])
        x = x.contiguous()
        self._sent.append((self._guard(goal, lambda: self._links.post(channel, x, self._tag(goal))), x, goal))

    def receive(self, goal: Action) -> Tensor:
        """Wait for what an action needs: on an accelerator its stream waits, not the process."""
        channel = (self._source(goal), self._links.device)
        while goal not in self._posted:
            self._post(channel)
        work, buffer = self._posted.pop(goal)
        self._guard(goal, work.wait)
        return buffer

    def release(self, buffer: Tensor) -> None:
        """Give a received buffer back."""
        self._links.return_buffer(buffer)

    def finish(self) -> None:
        """Wait until everything was sent."""
        for work, _, goal in self._sent:
            self._guard(goal, work.wait)
        self._sent.clear()

    def _top_up(self, channel: Channel) -> None:
        coming, waiting = self._coming[channel], sum(1 for goal in self._posted if self._source(goal) == channel[0])
        while coming and waiting < AHEAD and self._after[self._maker(coming[0])] <= self._launched:
            self._post(channel)
            waiting += 1

    def _post(self, channel: Channel) -> None:
        goal = self._coming[channel].popleft()
        buffer = self._links.take_buffer(*self._form)
        self._posted[goal] = (self._guard(goal, lambda: self._links.post(channel, buffer, self._tag(goal))), buffer)

    def _maker(self, goal: Action) -> Action:
        source = self._table.needs(goal)
        assert source is not None
        return source

    def _source(self, goal: Action) -> int:
        return self._table.place[self._maker(goal).stage]

    def _tag(self, goal: Action) -> int:
        return 1 + (goal.stage * 2 + (goal.kind == "B")) * self._table.microbatches + goal.micro

    def _guard(self, goal: Action, call: Any) -> Any:
        """Turn the loss of the other end into one message."""
        try:
            return call()
        except RuntimeError as error:
            raise PeerLost(f"the pipeline stopped at {goal}: the device at its other end is gone ({_first_line(error)}).") from error


def _first_line(error: BaseException) -> str:
    return re.sub(r"^\[/\S*\] ", "", str(error).strip()).partition(". ")[0].partition("\n")[0][:200]
