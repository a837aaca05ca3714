"""Classes mixed of an object's own and one of ours."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mixdq_ao.mixin import mix_in, own_class, restore


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
    mix_in(layer, Doubling, name="Twice")
    return layer


def test_one_class_for_the_same_two_until_it_is_restored(layer):
    other = Keeping(3, 2)
    mix_in(other, Doubling, name="Twice")
    assert type(layer) is type(other) and type(layer).__module__ == __name__
    assert own_class(layer) is Keeping and own_class(nn.Linear(1, 1)) is nn.Linear
    restore(layer)
    assert type(layer) is Keeping


def test_ours_last_is_what_super_finds():
    class Own(nn.Linear):
        def forward(self, x):
            return 1 + super().forward(x)

    class Tripled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    own, x = Own(3, 2), torch.ones(1, 3)
    plain = nn.Linear.forward(own, x)
    mix_in(own, Tripled, name="Both", ours_first=False)
    assert torch.equal(own(x), 1 + 3 * plain)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_of_the_mixed_class_and_carry_what_both_parts_say(layer, copied):
    x = torch.ones(1, 3)
    other = copied(layer)
    assert type(other) is type(layer) and other.carried and not hasattr(layer, "carried")
    assert torch.equal(other(x), layer(x)) and torch.equal(other(x), 2 * nn.Linear.forward(layer, x))


def test_a_class_made_of_a_mixed_one_copies_as_itself(layer):
    class Further(type(layer)):
        pass

    layer.__class__ = Further
    assert type(copy.deepcopy(layer)) is Further
