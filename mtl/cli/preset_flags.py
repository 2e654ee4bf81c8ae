"""What commands about a model share: the preset's name among the flags, the mesh as text, and the table for it."""

import dataclasses

import sharding_rules
from experiments.presets import PRESETS
from experiments.settings import Experiment
from mtl.errors import UserError, unknown
from mtl.inspect.mesh import parse_mesh
from mtl.sharding.mesh import MeshShape
from mtl.sharding.rules import Rules, check_mesh


def take_preset(arguments: list[str], default: str = "llama3_8b") -> tuple[str, Experiment, list[str]]:
    """Take ``--preset NAME`` out of the arguments; give the name, the preset and the rest."""
    name, rest = default, list(arguments)
    for i, word in enumerate(arguments):
        flag, equals, value = word.partition("=")
        if flag == "--preset":
            if not equals and i + 1 == len(arguments):
                raise UserError(f"--preset needs a name: {', '.join(PRESETS)}.")
            name = value if equals else arguments[i + 1]
            rest = arguments[:i] + arguments[i + (1 if equals else 2) :]
            break
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return name, PRESETS[name], rest


def place(setup: Experiment, mesh: str, rules: str | None) -> tuple[Experiment, Rules, MeshShape]:
    """Read mesh and rules as the commands take them; without rules, the table that fits the mesh."""
    shape = parse_mesh(mesh)
    table = sharding_rules.load(rules or sharding_rules.choose(shape))
    check_mesh(table, shape)
    return dataclasses.replace(setup, rules=rules), table, shape
