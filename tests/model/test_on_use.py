"""What a model computes with is found at the level of parameters, whether or not the module that holds them is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bigq.errors import UnsupportedModelError
from bigq.model.blocks import find_blocks
from bigq.model.description import OnUse

VALUES = {"used": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "unused": torch.tensor([5.0, 6.0])}


class Watched:
    """Two parameters on meta, and the names of those that something asked for."""

    def __init__(self) -> None:
        self.parameters = {name: nn.Parameter(value.to("meta"), requires_grad=False) for name, value in VALUES.items()}
        self.asked: list[str] = []

    def mode(self) -> OnUse:
        def use(name: str) -> Tensor:
            self.asked.append(name)
            return VALUES[name]

        return OnUse(self.parameters, torch.device("cpu"), use)


def test_what_a_parameter_on_meta_would_spoil_without_an_error() -> None:
    """torch adds a tensor on meta in place to a real one and changes nothing: this is why uses are watched, not modules."""
    total = torch.zeros(2)
    total += Watched().parameters["used"][0]
    assert torch.equal(total, torch.zeros(2))


def test_a_parameter_is_there_when_something_computes_with_it() -> None:
    watched, total, x = Watched(), torch.zeros(2), torch.ones(1, 2)
    used = watched.parameters["used"]
    with watched.mode():
        total += used[0]
        assert torch.equal(total, torch.tensor([1.0, 2.0]))
        assert torch.equal(functional.linear(x, used), torch.tensor([[3.0, 7.0]]))
        assert torch.equal(torch.cat([x, used]), torch.cat([x, VALUES["used"]]))
        assert torch.equal(used.T, VALUES["used"].T)
    assert set(watched.asked) == {"used"}


def test_what_asks_for_no_values_loads_nothing() -> None:
    watched = Watched()
    with watched.mode():
        for parameter in watched.parameters.values():
            assert parameter.device == torch.device("cpu") and parameter.dtype == torch.float32 and parameter.ndim == parameter.dim()
            assert parameter.shape == parameter.size() and parameter.numel() and parameter.is_floating_point()
    assert not watched.asked
    assert watched.parameters["used"].device.type == "meta"


class Block(nn.Linear):
    pass


class Model(nn.Module):
    """A tower of large blocks beside a language model of small ones; both are blocks by the model's own word."""

    _no_split_modules = ("Block",)

    def __init__(self, *, tower: bool) -> None:
        super().__init__()
        self.text = nn.Module()
        self.text.embed = nn.Embedding(8, 4)
        if tower:
            self.tower = nn.Module()
            self.tower.layers = nn.ModuleList(Block(64, 64) for _ in range(4))
        self.text.layers = nn.ModuleList(Block(4, 4) for _ in range(2))
        self.text.others = nn.ModuleList(Block(3, 3) for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.text.embed  # type: ignore[return-value]


@pytest.mark.parametrize("tower", [False, True])
def test_the_blocks_are_those_beside_the_embedding(tower: bool) -> None:
    path, blocks = find_blocks(Model(tower=tower))
    assert (path, len(blocks)) == ("text.layers", 2)


def test_a_model_that_does_not_say_where_its_embedding_is_has_its_largest_blocks() -> None:
    class Silent(Model):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert find_blocks(Silent(tower=True))[0] == "tower.layers"
    with pytest.raises(UnsupportedModelError, match="no list of decoder blocks found"):
        find_blocks(nn.Linear(2, 2))
