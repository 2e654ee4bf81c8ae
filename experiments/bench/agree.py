"""Do several layouts train alike? Run step.py under each and compare the loss curves: `python experiments/bench/agree.py LAYOUT...`.

A layout is NAME:WORLD:FLAGS, such as `tensor4:4:--mesh.tensor 4`; the first is what the others are held against.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from mtl.errors import UserError
from mtl.runtime.process import command_line, guarded


def main() -> None:
    """Run all layouts (arguments after `--` go to each) and print the largest relative gap of each curve."""
    arguments = command_line()
    split = arguments.index("--") if "--" in arguments else len(arguments)
    layouts, shared = arguments[:split], arguments[split + 1 :]
    if "--json" not in shared[:-1] or not layouts:
        raise UserError("agree.py needs layouts, then `--`, then step.py's flags with `--json FILE` among them.")
    target = Path(shared[shared.index("--json") + 1])
    curves: dict[str, list[float]] = {}
    for layout in layouts:
        name, world, flags = layout.split(":", 2)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", world, "experiments/bench/step.py"]
        done = subprocess.run([*command, *shlex.split(flags), *shared], check=False)
        if done.returncode:
            print(f"{name}: failed with code {done.returncode}", flush=True)
            continue
        curves[name] = json.loads(target.read_text().splitlines()[-1])["losses"]
    first = next(iter(curves))
    for name, losses in curves.items():
        gap = max(abs(a - b) / abs(b) for a, b in zip(losses, curves[first], strict=True))
        print(f"{name:24s} against {first}: largest gap of the loss over {len(losses)} steps {gap:.4%}", flush=True)


if __name__ == "__main__":
    guarded(main)
