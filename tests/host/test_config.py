"""Options: what is accepted, and what an error says."""

from typing import Any

import pytest

from fusepass.host.config import Options, accepted, inner_backends
from fusepass.host.kernel_names import KERNELS


def test_defaults() -> None:
    assert Options.from_user() == Options(inner="inductor", kernel="auto", precision="native", validate=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_name_is_accepted(kernel: str) -> None:
    assert Options.from_user(kernel=kernel).kernel == kernel


def test_inner_may_be_a_callable_or_any_backend() -> None:
    def compiler(gm: Any, example_inputs: Any) -> Any:
        return gm.forward

    assert Options.from_user(inner=compiler).inner is compiler
    assert Options.from_user(inner="eager_noexcept").inner == "eager_noexcept"
    assert "inductor" in inner_backends()
    assert "fusepass" not in inner_backends()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kernal": "sdpa"}, ValueError, ["'kernal'", "'inner'", "did you mean 'kernel'?"]),
        ({"kernel": "flash"}, ValueError, ["'flash'", "'flex'", "'reference'", "did you mean 'flash"]),
        ({"kernel": 3}, TypeError, ["kernel=3", "a string", "int", "'sdpa'"]),
        (
            {"precision": "fp4"},
            ValueError,
            ["'fp4'", "'native', 'fp8', 'fp8_unrotated'", "did you mean 'fp8'?"],
        ),
        ({"validate": "yes"}, TypeError, ["validate='yes'", "True or False"]),
        ({"validate": 1}, TypeError, ["validate=1", "True or False"]),
        ({"inner": "indctor"}, ValueError, ["'indctor'", "did you mean 'inductor'?"]),
        ({"inner": None}, TypeError, ["inner=None", "backend name or a callable", "NoneType"]),
        ({"inner": "fusepass"}, ValueError, ["inner='fusepass'", "'inductor'"]),
    ],
)
def test_an_error_names_the_value_and_what_is_accepted(
    options: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as raised:
        Options.from_user(**options)
    for word in words:
        assert word in str(raised.value)


def test_the_pass_is_not_its_own_inner_backend() -> None:
    from fusepass.compilation.backend import fusepass as backend

    with pytest.raises(ValueError, match="cannot be its own inner backend"):
        Options(inner=backend)


def test_no_suggestion_for_what_is_like_nothing() -> None:
    assert "did you mean" not in accepted("zzzz", KERNELS)
