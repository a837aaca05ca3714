"""Classes mixed of an object's own and one of ours."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mixdq_ao.mixin import mixed_class, own_class


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Keeping(nn.Linear):
    """Has a say in how it is pickled."""

    def __reduce_ex__(self, protocol):
        made, given, state, *more = super().__reduce_ex__(protocol)
        return (made, given, {**state, "carried": True}, *more)


@pytest.fixture
def layer() -> nn.Module:
    torch.manual_seed(0)
    layer = Keeping(3, 2)
    layer.__class__ = mixed_class("Twice", Doubling, Keeping, own=1)
    return layer


def test_one_class_for_the_same_bases(layer):
    assert type(layer) is mixed_class("Twice", Doubling, Keeping, own=1)
    assert own_class(layer) is Keeping and own_class(nn.Linear(1, 1)) is nn.Linear
    assert type(layer).__module__ == __name__


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_of_the_mixed_class_and_carry_what_both_parts_say(layer, copied):
    x = torch.ones(1, 3)
    other = copied(layer)
    assert type(other) is type(layer) and other.carried and not hasattr(layer, "carried")
    assert torch.equal(other(x), layer(x)) and torch.equal(other(x), 2 * nn.Linear.forward(layer, x))


def test_a_class_made_of_a_mixed_one_pickles_as_itself(layer):
    layer.__class__ = Further
    assert type(copy.deepcopy(layer)) is Further


class Further(mixed_class("Twice", Doubling, Keeping, own=1)):
    pass
