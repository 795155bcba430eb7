"""The rules by which a file of somebody else is checked: what they accept, and what they refuse."""

import pytest
import torch

from timm_npu_irv2 import rules

ODD = {
    'sparse': torch.eye(2).to_sparse(),
    'without data': torch.empty(2, device='meta'),
}


@pytest.mark.parametrize('value', ODD.values(), ids=ODD)
def test_only_ordinary_tensors_are_accepted(value):
    with pytest.raises(rules.Mismatch, match='not an ordinary one'):
        rules.check_size({'state_dict': [value]}, 10**6)


def test_memory_behind_a_small_view_counts_and_shared_memory_counts_once():
    whole = torch.zeros(100)
    rules.check_size([whole[:50], whole[50:]], whole.nbytes)
    with pytest.raises(rules.Mismatch, match='unfold'):
        rules.check_size(whole[:1], whole.nbytes - 1)
    with pytest.raises(rules.Mismatch, match='unfold'):
        rules.check_size(torch.zeros(1).expand(200), whole.nbytes)


def test_truth_is_no_number():
    for rule in rules.number(0, 1), rules.number(0, 1, integer=True):
        rule(1, 'epoch')
        with pytest.raises(rules.Mismatch, match='epoch is True, expected'):
            rule(True, 'epoch')
