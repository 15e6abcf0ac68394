import numpy as np
import pytest
from datasets.utils.stratify import stratified_shuffle_split_generate_indices

from vit_simple.data.splitting import stratified_split


@pytest.mark.parametrize("num_classes", [2, 3, 10, 97, 1000])
def test_stratified_split_equals_that_of_datasets(num_classes):
    """Runs that were started with the function of `datasets` must resume with the same split."""
    rng = np.random.default_rng(num_classes)
    for fraction in (0.1, 0.25, 1 / 3, 0.5, 0.77):
        targets = np.concatenate([np.arange(num_classes).repeat(2), rng.zipf(1.5, 20 * num_classes) % num_classes])
        targets = rng.permutation(targets)
        held_out = int(np.ceil(fraction * len(targets)))
        if min(held_out, len(targets) - held_out) < num_classes:
            continue
        generators = [np.random.default_rng(7) for _ in range(2)]
        train, validation = stratified_split(targets, held_out, generators[0])
        expected = next(
            stratified_shuffle_split_generate_indices(targets, len(targets) - held_out, held_out, generators[1])
        )
        assert np.array_equal(train, expected[0]) and np.array_equal(validation, expected[1])
