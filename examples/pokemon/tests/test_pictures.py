import pytest
import torch

from pokemon_cam.pictures import PictureSet, split


def make_numbered(*counts: int) -> PictureSet:
    """Return ``counts[k]`` pictures of each class k; picture i has one pixel, of value i."""
    labels = torch.tensor([k for k, count in enumerate(counts) for _ in range(count)])
    images = torch.arange(len(labels)).to(torch.int32)[:, None, None, None]
    return PictureSet(images, labels, tuple(f"class {k}" for k in range(len(counts))))


def test_split_is_disjoint_complete_and_stratified() -> None:
    train, test = split(make_numbered(100, 50, 11), seed=0)
    used = torch.cat([train.images, test.images]).flatten().tolist()
    assert sorted(used) == list(range(161))
    # About 18% of each class.
    assert test.labels.bincount().tolist() == [18, 9, 2]


def test_split_has_about_the_papers_sizes() -> None:
    # Rounding in each class moves three pictures from the paper's 269 to training.
    train, test = split(make_numbered(*[210] * 7), seed=0)
    assert (len(train), len(test)) == (1204, 266)


def test_split_follows_its_seed() -> None:
    one, again, other = (split(make_numbered(40, 40), seed=s)[1] for s in (0, 0, 1))
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, other.images)


def test_class_with_two_pictures_is_in_both_sets() -> None:
    train, test = split(make_numbered(2, 2), seed=0)
    assert train.labels.tolist() == test.labels.tolist() == [0, 1]


def test_class_with_one_picture_is_reported() -> None:
    with pytest.raises(ValueError, match=r"expected at least 2 of each class, got 1 of 'class 1'"):
        split(make_numbered(3, 1), seed=0)


def test_subset_and_batches_keep_masks_with_their_pictures() -> None:
    pictures = make_numbered(3, 2)
    masks = torch.arange(5)[:, None, None] % 2 == 0
    pictures = PictureSet(pictures.images, pictures.labels, pictures.classes, masks)
    chosen = pictures.subset(torch.tensor([4, 1, 2]))
    assert chosen.images.flatten().tolist() == [4, 1, 2]
    assert chosen.labels.tolist() == [1, 0, 0]
    assert chosen.masks is not None
    assert chosen.masks.flatten().tolist() == [True, False, True]
    assert [len(batch) for batch in pictures.batches(2)] == [2, 2, 1]
