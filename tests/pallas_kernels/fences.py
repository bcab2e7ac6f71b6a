"""Finds exchanges through shared memory that a GPU kernel does not fence, by reading the kernel.

The kernels place their own barriers, and the interpreter cannot tell whether they do it right: to it a warpgroup is one
thread. On a GPU the warps of a warpgroup run apart. The rules, for each warpgroup and piece of shared memory:

1. What was stored is fenced off (``commit_smem``) before a matrix instruction or a bulk copy reads it, and before the
   warpgroup arrives at a barrier if another one's matrix instructions may read it.
2. What a matrix instruction reads is not stored to before a barrier: it ends in each warp by itself.
3. What a bulk copy reads is not stored to before a wait for copies.
4. What was stored, or loaded, is not loaded, or stored to, in another shape before a barrier: the numbers are other
   lanes' then. In the same shape they are taken to be the lane's own.

The reader takes loops twice and conditions as true, does not tell apart the slots of a buffer, and takes as barriers
also a wait for what all lanes have arrived at, and a wait for a buffer's next filling. So it may overlook something;
what it finds is worth a look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
from jax._src import source_info_util

_KERNELS = ("core_map", "mpmd_map")


class Access(NamedTuple):
    """A load or store, what a matrix instruction or a bulk copy reads, or an arrival at a barrier."""

    kind: Literal["load", "store", "multiply", "copy", "arrive"]
    buffer: Any
    shape: tuple[int, ...]
    line: str


class Unfenced(NamedTuple):
    """Two accesses, the second without the fence that it needs after the first."""

    kernel: str
    first: Access
    second: Access


def unfenced(function: Callable[..., Any], *arguments: Any) -> tuple[set[str], set[Unfenced]]:
    """Returns the names of the kernels that a call launches, and what they do not fence."""
    found: set[Unfenced] = set()
    names = set()
    for equation in _kernels(jax.make_jaxpr(function)(*arguments).jaxpr):
        name = equation.params["name"]
        names.add(name)
        for body in _jaxprs(equation):
            multiplied: set[Any] = set()
            filled: dict[Any, set[Any]] = {}
            # The first time it does not know yet what later roles multiply and load.
            for findings in (set(), found):
                reader = _Reader(name, findings, multiplied, filled)
                reader.read(body, {var: var for var in [*body.constvars, *body.invars]})
    return names, found


@dataclasses.dataclass
class _Reader:
    """Reads one kernel as one warpgroup executes it."""

    kernel: str
    found: set[Unfenced]
    multiplied: set[Any]
    """Buffers that matrix instructions read, in any warpgroup."""
    filled: dict[Any, set[Any]]
    """Buffers that bulk copies fill, in any warpgroup, by the barriers that say so."""
    accesses: list[Access] = dataclasses.field(default_factory=list)
    """Since the last barrier."""
    unfenced_stores: list[Access] = dataclasses.field(default_factory=list)
    """Since the last fence."""
    arrived: set[Any] = dataclasses.field(default_factory=set)
    """Barriers at which all lanes of the warpgroup have arrived."""

    def read(self, jaxpr: Any, buffers: dict[Any, Any]) -> None:
        """Reads equations; ``buffers`` are the references they know, by the names they have here."""
        for equation in jaxpr.eqns:
            self._read_equation(equation, buffers)

    def _read_equation(self, equation: Any, buffers: dict[Any, Any]) -> None:
        name = equation.primitive.name
        operands = [buffers.get(var) if _is_shared(var) else None for var in equation.invars]
        match name:
            case "load" | "get":
                self._access("load", operands[0], equation, equation.outvars[0])
            case "store" | "swap":
                self._access("store", operands[0], equation, equation.invars[1])
            case "wgmma_ref":
                for operand in operands[1:]:
                    self._access("multiply", operand, equation)
                    self.multiplied.add(operand)
            case "copy_smem_to_gmem":
                for operand in operands:
                    self._access("copy", operand, equation)
            case "copy_gmem_to_smem":
                _, target, barrier = [buffers.get(var) for var in equation.invars if _is_reference(var)][:3]
                self.filled.setdefault(barrier, set()).add(target)
            case "barrier_arrive":
                for buffer in self.multiplied & {store.buffer for store in self.unfenced_stores}:
                    self._access("arrive", buffer, equation)
                self.arrived.add(buffers[equation.invars[0]])
            case "barrier_wait":
                barrier = buffers[equation.invars[0]]
                if barrier in self.arrived:
                    self._keep(lambda access: access.kind == "copy")
                self._keep(lambda access: access.buffer not in self.filled.get(barrier, ()))
            case "wait_smem_to_gmem":
                self.accesses = []
            case "commit_smem":
                self._keep(lambda access: access.kind == "copy")
                self.unfenced_stores = []
            case "cond":
                self._read_branches(equation, buffers)
            case "while":
                skipped = equation.params["cond_nconsts"]
                self._enter(equation.params["body_jaxpr"], equation.invars[skipped:], buffers, times=2)
            case "run_scoped":
                inner = equation.params["jaxpr"]
                self._enter(inner, equation.invars, buffers, parameters=inner.constvars)
            case _:
                for inner in _jaxprs(equation):
                    self._enter(inner, equation.invars, buffers, times=2 if name == "scan" else 1)

    def _keep(self, still_matters: Callable[[Access], bool]) -> None:
        self.accesses = [access for access in self.accesses if still_matters(access)]

    def _read_branches(self, equation: Any, buffers: dict[Any, Any]) -> None:
        for branch in equation.params["branches"]:
            if _has_loop(branch):
                # A role of one warpgroup, of which the others know nothing.
                role = dataclasses.replace(self, accesses=[], unfenced_stores=list(self.unfenced_stores))
                role._enter(branch, equation.invars[1:], buffers)
            else:
                self._enter(branch, equation.invars[1:], buffers)

    def _enter(
        self, jaxpr: Any, arguments: Any, buffers: dict[Any, Any], *, parameters: Any = None, times: int = 1
    ) -> None:
        """Reads an equation's own equations, in which arguments go by the names of the parameters."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known = {var: var for var in jaxpr.invars}
        for parameter, argument in zip(jaxpr.invars if parameters is None else parameters, arguments, strict=True):
            known[parameter] = buffers.get(argument) if _is_reference(argument) else None
        for _ in range(times):
            self.read(jaxpr, known)

    def _access(self, kind: Any, buffer: Any, equation: Any, value: Any = None) -> None:
        if buffer is None:
            return
        access = Access(kind, buffer, () if value is None else tuple(value.aval.shape), _line(equation))
        if kind in ("multiply", "copy", "arrive"):
            earlier = self.unfenced_stores
        else:
            earlier = [before for before in self.accesses if _collide(before, access)]
        for before in earlier:
            if before.buffer is buffer:
                self.found.add(Unfenced(self.kernel, before, access))
        self.accesses.append(access)
        if kind == "store":
            self.unfenced_stores.append(access)


def _collide(before: Access, access: Access) -> bool:
    """Whether a load or store may meet what other lanes do with the same buffer."""
    if access.kind == "store" and before.kind in ("multiply", "copy"):
        return True
    return {before.kind, access.kind} == {"load", "store"} and before.shape != access.shape


def _kernels(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name in _KERNELS:
            yield equation
        else:
            for inner in _jaxprs(equation):
                yield from _kernels(inner)


def _jaxprs(equation: Any) -> Iterator[Any]:
    for parameter in equation.params.values():
        for value in parameter if isinstance(parameter, list | tuple) else [parameter]:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield value


def _has_loop(jaxpr: Any) -> bool:
    return any(equation.primitive.name in ("scan", "while") for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _is_reference(var: Any) -> bool:
    return hasattr(var, "aval") and hasattr(var.aval, "inner_aval")


def _is_shared(var: Any) -> bool:
    return _is_reference(var) and "smem" in str(getattr(var.aval, "memory_space", "")).lower()


def _line(equation: Any) -> str:
    frames = source_info_util.user_frames(equation.source_info.traceback)
    lines = [f"{frame.file_name.split('/')[-1]}:{frame.start_line}" for frame in frames]
    return " < ".join([line for line in lines if "compat" not in line][:3])
