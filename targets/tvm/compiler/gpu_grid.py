"""Turn CPU kernels into GPU kernels: loops over work items become grids of threads, vectors become single numbers.

The bodies of the kernels stay those of the CPU. One GPU thread computes one work item, and a buffer that was private to
a CPU thread becomes private to the GPU thread.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from passopt.ir.errors import ModelError

#: A TIR object; tvm carries no types.
Tvm: TypeAlias = Any

#: The number of threads per block. A work item uses many registers, so blocks are small.
THREADS = 64
_BINARY = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Mod", "FloorDiv", "FloorMod", "Min", "Max", "EQ", "NE", "LT", "LE", "GT", "GE"),
        *("And", "Or", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "LShift", "RShift"),
    )
)
_LEAVES = frozenset(("IntImm", "FloatImm", "StringImm"))
#: Intrinsics that are only hints to the caches of a CPU, so they can be left out.
_HINTS = ("llvm.prefetch",)


def bind_threads(function: Tvm, name: str) -> Tvm:
    """Return `function`, a PrimFunc with `T.parallel` loops, with each of these loops launched as a grid of threads.

    Raises ModelError with the kernel's `name` if a statement or expression has no form on a GPU.
    """
    return _Binder(name).function(function)


class _Binder:
    """Rewrite one function for a GPU.

    `_buffers` maps a buffer of the CPU kernel to the thread's own buffer, and `_lanes` maps a variable to one variable
    per lane of its vector.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._buffers: dict[Tvm, Tvm] = {}
        self._lanes: dict[Tvm, list[Tvm]] = {}

    def function(self, function: Tvm) -> Tvm:
        """Return `function` with its parallel loops as grids, marked as scheduled."""
        body = self._outside(function.body)
        return function.with_body(body).with_attr("tirx.is_scheduled", True)

    def _unknown(self, node: Tvm, where: str) -> ModelError:
        return ModelError(f"kernel {self._name}: {type(node).__name__} {where} has no form on a GPU:\n{node}")

    # The following runs on the host: the statements around the loops over work items.

    def _outside(self, node: Tvm) -> Tvm:
        from tvm import s_tir, tirx

        kind = type(node).__name__
        if kind == "SBlockRealize":
            block = node.block
            body = self._outside(block.body)
            made = s_tir.SBlock(block.iter_vars, block.reads, block.writes, block.name_hint, body, block.init)
            return s_tir.SBlockRealize(node.iter_values, node.predicate, made)
        if kind == "SeqStmt":
            return tirx.SeqStmt([self._outside(item) for item in node.seq])
        if kind == "IfThenElse":
            if _is_twin(node.then_case, node.else_case):
                return self._outside(node.else_case)
            other = None if node.else_case is None else self._outside(node.else_case)
            return tirx.IfThenElse(node.condition, self._outside(node.then_case), other)
        if kind == "For" and node.kind == tirx.ForKind.PARALLEL:
            return self._grid(node)
        if kind in {"Bind", "DeclBuffer", "AllocBuffer"}:
            return node
        raise self._unknown(node, "outside of the loop over work items")

    def _grid(self, loop: Tvm) -> Tvm:
        """Turn a loop over work items into a grid with one thread per item; the last block may be partly idle."""
        from tvm import tirx

        dtype = _dtype(loop.loop_var)
        block, thread = tirx.Var("block", dtype), tirx.Var("thread", dtype)
        index = block * THREADS + thread + loop.min
        body = tirx.SeqStmt([tirx.Bind(loop.loop_var, index), self._inside(loop.body)])
        body = tirx.IfThenElse(index < loop.min + loop.extent, body, None)
        threads = tirx.const(THREADS, dtype)
        for variable, extent, tag in (
            (thread, threads, "threadIdx.x"),
            (block, (loop.extent + (THREADS - 1)) // threads, "blockIdx.x"),
        ):
            axis = tirx.IterVar(None, tirx.Var(tag, dtype), tirx.IterVar.ThreadIndex, tag)
            body = tirx.For(variable, tirx.const(0, dtype), extent, tirx.ForKind.THREAD_BINDING, body, axis)
        return body

    # The following runs in a GPU thread: the body of a work item.

    def _inside(self, node: Tvm) -> Tvm:
        from tvm import tirx

        kind = type(node).__name__
        if kind == "SeqStmt":
            return tirx.SeqStmt([self._inside(item) for item in node.seq])
        if kind == "IfThenElse":
            other = None if node.else_case is None else self._inside(node.else_case)
            return tirx.IfThenElse(self._scalar(node.condition), self._inside(node.then_case), other)
        if kind == "For":
            loop = tirx.ForKind.UNROLLED if node.kind == tirx.ForKind.UNROLLED else tirx.ForKind.SERIAL
            start, extent = self._scalar(node.min), self._scalar(node.extent)
            return tirx.For(node.loop_var, start, extent, loop, self._inside(node.body))
        if kind == "AllocBuffer":
            return tirx.AllocBuffer(self._own(node.buffer))
        if kind == "Bind":
            return self._bind(node)
        if kind == "BufferStore":
            return self._store(node)
        if kind == "Evaluate":
            return self._evaluate(node)
        raise self._unknown(node, "in a thread")

    def _own(self, buffer: Tvm) -> Tvm:
        """Return the thread's own buffer for a buffer of the CPU kernel, whose size must be known."""
        from tvm import tirx

        made = tirx.decl_buffer(buffer.shape, buffer.dtype, buffer.name, scope="local", layout=None)
        self._buffers[buffer] = made
        return made

    def _bind(self, node: Tvm) -> Tvm:
        from tvm import tirx

        lanes, dtype = _lanes(node.value), _element(node.value)
        made = [tirx.Var(node.var.name, dtype) for _ in range(lanes)]
        self._lanes[node.var] = made
        return _sequence([tirx.Bind(made[lane], self._lane(node.value, lane)) for lane in range(lanes)])

    def _store(self, node: Tvm) -> Tvm:
        from tvm import tirx

        lanes, dtype = _lanes(node.value), _element(node.value)
        buffer = self._buffers.get(node.buffer, node.buffer)
        if lanes == 1:
            return tirx.BufferStore(buffer, self._scalar(node.value), [self._scalar(item) for item in node.indices])
        # All lanes are read before any is written, as with a vector.
        made = [tirx.Var("lane", dtype) for _ in range(lanes)]
        read = [tirx.Bind(made[lane], self._lane(node.value, lane)) for lane in range(lanes)]
        written = [
            tirx.BufferStore(buffer, made[lane], [self._lane(item, lane) for item in node.indices])
            for lane in range(lanes)
        ]
        return _sequence([*read, *written])

    def _evaluate(self, node: Tvm) -> Tvm:
        from tvm import tirx

        if _is_hint(node.value):
            return tirx.Evaluate(tirx.const(0, "int32"))
        raise self._unknown(node, "in a thread")

    def _scalar(self, node: Tvm) -> Tvm:
        if _lanes(node) != 1:
            raise self._unknown(node, "where a number is expected")
        return self._lane(node, 0)

    def _lane(self, node: Tvm, lane: int) -> Tvm:
        """Return the expression for one lane of a vector; a single number is the same in every lane."""
        from tvm import ir, tirx

        kind = type(node).__name__
        if kind in _LEAVES:
            return node
        if kind == "Var":
            found = self._lanes.get(node)
            return node if found is None else found[lane if len(found) > 1 else 0]
        if kind == "Ramp":
            return self._lane(node.base, 0) + self._lane(node.stride, 0) * lane
        if kind == "Broadcast":
            return self._lane(node.value, 0)
        if kind == "Shuffle":
            return self._shuffled(node, lane)
        if kind == "TensorLoad":
            buffer = self._buffers.get(node.source, node.source)
            return buffer[tuple(self._lane(item, lane) for item in node.indices)]
        if kind == "Cast":
            return tirx.Cast(_element(node), self._lane(node.value, lane))
        if kind in _BINARY:
            return type(node)(self._lane(node.a, lane), self._lane(node.b, lane))
        if kind == "Not":
            return tirx.Not(self._lane(node.a, lane))
        if kind == "Select":
            parts = (node.condition, node.true_value, node.false_value)
            return tirx.Select(*(self._lane(part, lane) for part in parts))
        if kind == "Call" and all(_lanes(item) in (1, _lanes(node)) for item in node.args):
            arguments = [self._lane(item, lane) for item in node.args]
            return ir.Call(node.op, arguments, node.attrs, node.ty_args, ret_ty=_element(node))
        raise self._unknown(node, "in a thread")

    def _shuffled(self, node: Tvm, lane: int) -> Tvm:
        position = int(node.indices[lane])
        for vector in node.vectors:
            if position < _lanes(vector):
                return self._lane(vector, position)
            position -= _lanes(vector)
        raise self._unknown(node, "in a thread")


def _is_twin(serial: Tvm, parallel: Tvm) -> bool:
    """Return whether two branches hold the same loop, once serial (for little work) and once parallel.

    A GPU needs only the parallel one, because its threads do not have to be woken.
    """
    from tvm import tirx
    from tvm_ffi import structural_equal

    if type(serial).__name__ != "For" or type(parallel).__name__ != "For":
        return False
    if parallel.kind != tirx.ForKind.PARALLEL:
        return False
    same = tirx.For(serial.loop_var, serial.min, serial.extent, tirx.ForKind.PARALLEL, serial.body)
    return bool(structural_equal(same, parallel))


def _is_hint(value: Tvm) -> bool:
    return type(value).__name__ == "Call" and any(hint in str(value) for hint in _HINTS)


def _sequence(items: list[Tvm]) -> Tvm:
    from tvm import tirx

    return items[0] if len(items) == 1 else tirx.SeqStmt(items)


def _lanes(node: Tvm) -> int:
    import tvm

    return int(tvm.DataType(_dtype(node)).lanes)


def _element(node: Tvm) -> str:
    return _dtype(node).split("x", maxsplit=1)[0]


def _dtype(node: Tvm) -> str:
    return str(node.ty.dtype)
