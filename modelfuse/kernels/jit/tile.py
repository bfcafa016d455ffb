"""The innermost loop of products of matrices, as LLVM code: compilers of loops do not keep sums in registers."""

from __future__ import annotations

from typing import Any

from modelfuse.kernels.jit.compile import Intrinsic


class Tile(Intrinsic):
    """Adds the product of two packed panels to a tile of sums, which stay in registers.

    Args:
        rows: Of the tile.
        vectors: In each row.
        width: Elements of a vector. Wider ones than the processor's are split, which changes no bit.
    """

    def __init__(self, rows: int, vectors: int, width: int) -> None:
        self.rows, self.columns = rows, vectors * width
        self._vectors, self._width = vectors, width

    def __call__(self, left: Any, first: int, right: Any, second: int, sums: Any, depth: int) -> None:
        """Not callable from Python.

        Args:
            left: The packed left operand: ``rows`` elements of each step.
            first: The index of the first one.
            right: The right one: ``columns`` elements of each step.
            second: The index of the first one.
            sums: The tile.
            depth: The number of steps.
        """
        raise NotImplementedError

    def generate(self, context: Any, builder: Any, types: Any, arguments: Any) -> Any:
        """A loop over the steps."""
        from llvmlite import ir

        word, double = ir.IntType(64), ir.DoubleType()
        vector = ir.VectorType(double, self._width)
        first, second, depth = arguments[1], arguments[3], arguments[5]
        left, right, sums = (
            context.make_array(types.args[number])(context, builder, arguments[number]).data for number in (0, 2, 4)
        )

        def address(base: Any, index: Any) -> Any:
            return builder.bitcast(builder.gep(base, [index]), vector.as_pointer())

        tile = [[word(row * self.columns + each * self._width) for each in range(self._vectors)]
                for row in range(self.rows)]  # fmt: skip
        begun = [[builder.load(address(sums, at), align=8) for at in row] for row in tile]
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(word)
        step.add_incoming(word(0), before)
        held = [[builder.phi(vector) for _ in row] for row in tile]
        start = builder.add(second, builder.mul(step, word(self.columns)))
        values = [
            builder.load(address(right, builder.add(start, word(each * self._width))), align=8)
            for each in range(self._vectors)
        ]
        start, added = builder.add(first, builder.mul(step, word(self.rows))), []
        for row, own in enumerate(held):
            factor = builder.load(builder.gep(left, [builder.add(start, word(row))]))
            lane = builder.insert_element(ir.Constant(vector, ir.Undefined), factor, ir.IntType(32)(0))
            mask = ir.Constant(ir.VectorType(ir.IntType(32), self._width), [0] * self._width)
            factor = builder.shuffle_vector(lane, ir.Constant(vector, ir.Undefined), mask)
            added.append([builder.fadd(sum_, builder.fmul(factor, value))
                          for sum_, value in zip(own, values, strict=True)])  # fmt: skip
        following = builder.add(step, word(1))
        step.add_incoming(following, loop)
        for own, new, old in zip(held, added, begun, strict=True):
            for sum_, now, was in zip(own, new, old, strict=True):
                sum_.add_incoming(was, before)
                sum_.add_incoming(now, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        for new, places in zip(added, tile, strict=True):
            for now, at in zip(new, places, strict=True):
                builder.store(now, address(sums, at), align=8)
        return context.get_dummy_value()
