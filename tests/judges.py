"""Outside judges, each in a process of its own: Orbax with JAX, and zarr-python. ``python -m tests.judges NAME PATH...`` prints JSON."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"


def digest(tree: Any) -> Any:
    """Spell a tree of arrays as JSON: type, shape and bytes of every leaf."""
    import numpy as np

    if isinstance(tree, dict):
        return {str(k): digest(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [digest(v) for v in tree]
    if tree is None or isinstance(tree, str):
        return tree
    x = np.asarray(tree)
    return f"{x.dtype} {list(x.shape)} {x.tobytes().hex()}"


def orbax_readers(step: str) -> dict[str, Any]:
    """Restore a step with every reader that Orbax has."""
    import jax
    import orbax.checkpoint as ocp
    from orbax.checkpoint import v1

    path = Path(step)
    manager = ocp.CheckpointManager(path.parent)
    found = {
        "pytree": ocp.PyTreeCheckpointer().restore(path / "state"),
        "standard": ocp.StandardCheckpointer().restore(path / "state"),
        "manager": manager.restore(int(path.name))["state"],
        "manager_args": manager.restore(int(path.name), args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"],
        "v1": v1.load(path),
    }
    assert manager.latest_step() == int(path.name)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found["pytree"])
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), target)
    jax.config.update("jax_enable_x64", True)
    found["sharded"] = ocp.StandardCheckpointer().restore(path / "state", target)
    return {name: digest(tree) for name, tree in found.items()}


def sample() -> dict[str, Any]:
    """A JAX tree of several types and nodes."""
    import jax.numpy as jnp
    import numpy as np

    w = jnp.arange(12).reshape(3, 4)
    return {
        "params": {"w": w.astype(jnp.bfloat16), "b": w[0].astype(jnp.float32)},
        "opt": [{"mu": w.astype(jnp.float32) / 3}, (np.arange(3), np.float64(2.5) * np.ones(()))],
        "scalar": 7,
        "none": None,
        "empty": {},
    }


def orbax_writers(folder: str) -> dict[str, Any]:
    """Save the sample in every layout that Orbax writes; gives where, and the sample."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import v1

    root, tree = Path(folder), sample()
    for ocdbt in (True, False):
        for zarr3 in (True, False):
            ocp.PyTreeCheckpointer(use_ocdbt=ocdbt, use_zarr3=zarr3).save(root / f"bare_{ocdbt}_{zarr3}", tree)
    manager = ocp.CheckpointManager(root / "manager")
    manager.save(4, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
    v1.save(root / "v1", {**tree, "text": "a string"})
    paths = [*(str(p) for p in root.glob("bare_*")), str(root / "manager/4"), str(root / "v1")]
    return {"paths": paths, "tree": digest(tree)}


def zarr_reader(array: str) -> Any:
    """Read one array with zarr-python."""
    import zarr

    return digest(zarr.open_array(array, mode="r")[...])


JUDGES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (orbax_readers, orbax_writers, zarr_reader)}


def ask(name: str, *arguments: str) -> Any:
    """Run a judge in a process of its own."""
    import subprocess

    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "tests.judges", name, *arguments], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(JUDGES[sys.argv[1]](*sys.argv[2:])))
