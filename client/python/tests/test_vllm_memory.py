"""Which tensors the vLLM connector takes for an engine's pages."""

from types import SimpleNamespace

import pytest

from kvtier.vllm.geometry import Geometry, LayerPage
from kvtier.vllm.memory import register


class Tensor:
    """As much of a tensor as is looked at."""

    device = SimpleNamespace(type="cpu")

    def __init__(self, *shape) -> None:
        self.shape = shape

    def unflatten(self, _, sizes):
        return Tensor(*sizes, *self.shape[1:])

    def __getitem__(self, _):
        return Tensor(*self.shape[1:])

    def numel(self):
        product = 1
        for size in self.shape:
            product *= size
        return product

    def element_size(self):
        return 2

    def view(self, *shape):
        return Tensor(*shape)


class FakeKvtier:
    """The package's cache, as what was added to it."""

    def __init__(self) -> None:
        self.added = []

    def PagedCache(self, model, tokens):  # noqa: N802
        return self

    def add(self, index, code, view) -> None:
        self.added.append((index, code, view.shape))


def registered(blocks, *shape):
    geometry = Geometry(16, (LayerPage("a", 16 * 2 * 8 * 2, "bfloat16"),), True)
    package = FakeKvtier()
    register(package, None, geometry, blocks, {"a": Tensor(*shape)})
    return package.added


def test_a_page_is_a_row_or_several() -> None:
    assert registered(4, 4, 2, 16, 8) == [(0, "latent", (4, 16, 16))]
    assert registered(4, 8, 2, 8, 8) == [(0, "latent", (4, 16, 16))]


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_k_and_v_in_halves_of_a_tensor_are_refused_however_few_blocks_there_are(blocks) -> None:
    with pytest.raises(ValueError, match="blocks"):
        registered(blocks, 2, blocks, 16, 8)
