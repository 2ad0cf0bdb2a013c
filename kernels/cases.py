"""What a kernel module tells the ahead-of-time compilation (aot.py): its launches, as a GPU would see them.

A module listed in `aot.MODULES` has

    def aot_cases(target: Target, weights: Sequence[Weight]) -> Iterator[Case]

which yields a case for every kernel that would be launched on that target, with the tiles and options the launch
would choose, and none for a kernel that would not. `weights` are the weight specs to cover; a module without weights
ignores them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .spec import Spec
from .tiles import Parts


@dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    # sm_90, gfx942 ...
    name: str
    # 10 * major + minor; AMD counts as 80 (matrix cores, bfloat16).
    capability: int
    # Triton's name of the 16-bit float that models run in.
    dtype: str

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")


@dataclass(frozen=True)
class Weight:
    """A weight spec and the pointer types ("*i32") of the parts it has, None for those it lacks."""

    spec: Spec
    pointers: Parts


@dataclass(frozen=True)
class Case:
    """One launch."""

    # Name, rows of x, and the weight spec or variant: with the target, what identifies a row of the table.
    kernel: str
    rows: int
    spec: str
    # Family of the weight, or what the kernel is about.
    family: str
    fn: Any
    # Argument name -> type: "*bf16", "i32", a (named) tuple of them, or None for an argument that is absent. Pointers
    # and integers are taken to divide by 16 unless the kernel does not specialize on them.
    arguments: Mapping[str, Any]
    # Values of the constexpr arguments.
    constants: Mapping[str, Any]
    # num_warps, num_stages, enable_fp_fusion.
    options: Mapping[str, Any] = field(default_factory=dict)
    # 16-bit float it was compiled with.
    dtype: str = ""
