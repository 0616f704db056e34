"""A few of the fuzzer's programs; `make fuzz` runs as many as time allows."""

import pytest

from tests.fuzz.draw import KERNELS, Choices, draw
from tests.fuzz.judge import judge
from tests.fuzz.programs import Program
from tests.fuzz.shrink import shrink

SEED, BLOCKS, PROGRAMS = 0, 5, 15


@pytest.mark.parametrize("block", range(BLOCKS))
def test_drawn_programs_are_right(block: int) -> None:
    first = block * PROGRAMS
    for number in range(first, first + PROGRAMS):
        program = draw(SEED, number, Choices())
        verdict = judge(program)
        assert not verdict.bad, f"{verdict.kind}: {'; '.join(verdict.reasons)}\n{program.script}"


def test_a_number_is_always_the_same_program() -> None:
    texts = [draw(7, number, Choices()).text for number in range(50)]
    assert texts == [draw(7, number, Choices()).text for number in range(50)]
    assert len(set(texts)) == 50


def test_every_drawn_script_is_python() -> None:
    for number in range(100):
        script = draw(3, number, Choices(operands_not_finite=number % 2 == 0)).script
        compile(script, "drawn", "exec")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_a_choice(kernel: str) -> None:
    assert draw(0, 0, Choices(kernel=kernel, inner="eager")).options == {"kernel": kernel, "inner": "eager"}


def test_shrinking_keeps_what_is_bad_and_no_more() -> None:
    large = next(p for p in (draw(0, n, Choices()) for n in range(100)) if ".softmax(" in p.text)

    def bad(program: Program) -> bool:
        return any(".softmax(" in line for line in program.body)

    small = shrink(large, bad, seconds=20)
    assert bad(small) and len(small.body) == 1
    assert len(small.sizes) == 1
