"""Which axis of a weight is the residual stream's. Does not import torch."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stethoscope.checkpoints.names import parse_name
from stethoscope.checkpoints.task_vector import TaskVector
from stethoscope.errors import CheckpointError

# The last module of a canonical name -> the axis of the stored weight that is the residual stream's.
READERS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"), 1),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"), 1),
    **dict.fromkeys(("gate", "shared_expert_gate"), 1),  # which expert a token goes to
    **dict.fromkeys(("c_attn", "c_fc"), 0),  # GPT-2's Conv1D stores (in, out)
}
WRITERS = {**dict.fromkeys(("o_proj", "down_proj", "dense", "fc2", "dense_4h_to_h"), 0), "c_proj": 1}


class ResidualAxis(NamedTuple):
    """The axis ``dim`` of a stored tensor is the residual stream's, which it writes to or reads from."""

    writes: bool
    dim: int


def residual_axis(name: str, shape: Sequence[int], width: int) -> ResidualAxis | None:
    """The residual axis of a layer's tensor; None for norms and readers' biases, which have none.

    Args:
        name: stored or canonical.
        width: of the residual stream.

    Raises:
        CheckpointError: the matrix' role is not known, or its shape is not that of its role.
    """
    name = parse_name(name).canonical
    *_, module, part = ("", *name.split("."))
    writes = module in WRITERS
    if len(shape) < 2:
        return ResidualAxis(writes=True, dim=0) if writes and part == "bias" else None
    dim = (WRITERS if writes else READERS).get(module) if part == "weight" and len(shape) == 2 else None
    if dim is None:
        raise _cannot_project([f"`{name}`: not known to read or to write the residual stream"])
    if shape[dim] != width:
        role = "writes to" if writes else "reads from"
        raise _cannot_project([
            f"`{name}` of shape {list(shape)} {role} the residual stream along axis {dim},"
            f" but the directions have {width} values"
        ])  # fmt: skip
    return ResidualAxis(writes=writes, dim=dim)


def residual_axes(task_vector: TaskVector, layers: Iterable[int], width: int) -> dict[str, ResidualAxis | None]:
    """`residual_axis` of every tensor that a task vector changes in some layers, by canonical name.

    Raises:
        CheckpointError: with every matrix whose role is not known or does not fit.
    """
    axes: dict[str, ResidualAxis | None] = {}
    problems: list[str] = []
    wanted = set(layers)
    for name in task_vector.names:
        entry = task_vector.base.entries[name]
        if entry.layer in wanted and entry.kind != "buffer":
            try:
                axes[name] = residual_axis(name, entry.shape, width)
            except CheckpointError as error:
                problems += error.problems
    if problems:
        raise _cannot_project(problems)
    return axes


def _cannot_project(problems: Sequence[str]) -> CheckpointError:
    hint = "leave out the arms that project: a matrix of unknown role can only be injected raw"
    return CheckpointError("some matrices cannot be projected onto feature directions", problems=problems, hint=hint)
