"""Whether a run takes tensor-parallel products in pieces, beside what they gather and sum (`--tensor.overlap`)."""

from experiments.settings import Experiment
from mtl.errors import UserError
from mtl.precision import Precision
from mtl.sharding.mesh import MeshShape
from mtl.sharding.rules import Rules


def takes_pieces(setup: Experiment, rules: Rules, shape: MeshShape, precision: Precision, engine: bool) -> bool:
    """Decide it: auto takes them where it can; refuses what was asked for and cannot be."""
    if setup.tensor.overlap == "off":
        return False
    missing = (
        "--mesh.tensor is 1, so products neither gather nor sum over it"
        if shape.tensor == 1
        else f"rules {rules.name!r} keep the sequence whole between layers (residual_seq has no tensor)"
        if "tensor" not in rules.act["residual_seq"]
        else "--mesh.pipe is above 1, and stages of pipelines do not take pieces"
        if shape.pipe > 1
        else f"precision {precision.name} multiplies in 8 bits, whose scales need the whole of what is gathered"
        if precision.fp8
        else "it needs copy engines, which --transport nccl leaves unused, or which this machine does not have"
        if not engine
        else ""
    )
    if missing and setup.tensor.overlap == "on":
        raise UserError(f"--tensor.overlap is on, but {missing}. Leave it out, or take off.")
    return not missing
