"""Test folders of pictures: which are classes and splits, and layouts that are refused."""

import errno
import os
from pathlib import Path

import pytest

from alexnet_jax.data.prepare import image_folder
from alexnet_jax.errors import UsageError


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def found(source):
    """{split: {name: label}}."""
    splits = {}
    for split, label, file in source.pictures():
        assert Path(file.path).stat().st_size == file.size
        assert file.path.endswith(file.name)
        assert file.offset == 0
        splits.setdefault(split, {})[file.name] = label
    return splits


def test_splits_that_are_folders(tmp_path):
    put(tmp_path, 'train/dog/1.jpg', 'train/cat/deep/2.PNG', 'train/cat/3.webp', 'val/cat/4.jpeg',
        'Test/dog/5.jpg', 'train/cat/notes.txt', 'train/.git/6.jpg', 'train/cat/.7.jpg',
        'notes.md')  # fmt: skip
    source = image_folder.source(tmp_path, 'pets')
    assert source.name == 'pets'
    assert source.class_names == ('cat', 'dog')
    assert found(source) == {
        'train': {'train/cat/3.webp': 0, 'train/cat/deep/2.PNG': 0, 'train/dog/1.jpg': 1},
        'validation': {'val/cat/4.jpeg': 0},
        'test': {'Test/dog/5.jpg': 1},
    }


def test_classes_are_listed(tmp_path, capsys):
    put(tmp_path, 'a/1.jpg', 'a/2.jpg', 'b/1.png', 'c/x/1.png')
    image_folder.source(tmp_path, 'x', validation=0, test=0)
    assert '3 classes: a, b, c\n' in capsys.readouterr().err


@pytest.mark.parametrize('inside', ['', 'train'])
def test_leftovers_of_systems_are_neither_classes_nor_pictures(tmp_path, inside, capsys):
    put(tmp_path / inside, 'a/1.jpg', 'b/1.jpg', '@eaDir/x.jpg', '__MACOSX/a/._1.jpg',
        'lost+found/1.jpg', '.ipynb_checkpoints/1.jpg', 'a/@eaDir/1.jpg/SYNOPHOTO_THUMB.jpg',
        'b/._1.jpg', 'Thumbs.db', 'a/desktop.ini', '$RECYCLE.BIN/1.jpg')  # fmt: skip
    source = image_folder.source(tmp_path, 'x', validation=0, test=0)
    assert source.class_names == ('a', 'b')
    assert sum(source.images.values()) == 2
    assert 'ignored files: none' in capsys.readouterr().err


def test_ignored_files_are_reported(tmp_path, capsys):
    put(tmp_path, 'a/1.jpg', 'a/2.heic', 'a/3.HEIC', 'a/.hidden', 'b/1.png', 'b/deep/README')
    image_folder.source(tmp_path, 'x', validation=0, test=0)
    assert capsys.readouterr().err.endswith('2 .heic, 1 no suffix; convert HEIC to JPEG first\n')
    put(tmp_path, 'c/1.heic')
    with pytest.raises(UsageError, match=r"no images of class 'c' .*3 \.heic.* convert HEIC"):
        image_folder.source(tmp_path, 'x')


def test_pictures_of_no_class_are_reported(tmp_path, capsys):
    put(tmp_path, 'train/a/1.jpg', 'train/b/1.jpg', 'val/a/2.jpg', 'train/stray.jpg',
        'test/stray.jpg')  # fmt: skip
    source = image_folder.source(tmp_path, 'x')
    assert found(source).keys() == {'train', 'validation'}
    assert 'ignored files: 2 .jpg' in capsys.readouterr().err


def test_two_folders_of_one_split_are_merged(tmp_path):
    put(tmp_path, 'train/a/1.jpg', 'train/b/1.jpg', 'val/a/2.jpg', 'valid/a/2.jpg', 'valid/b/3.jpg')
    splits = found(image_folder.source(tmp_path, 'x'))
    assert splits['validation'] == {'val/a/2.jpg': 0, 'valid/a/2.jpg': 0, 'valid/b/3.jpg': 1}


def test_links_are_followed_and_loops_refused(tmp_path):
    put(tmp_path, 'pets/a/1.jpg', 'pets/b/1.jpg', 'elsewhere/2.jpg')
    (tmp_path / 'pets/a/more').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'pets/c').symlink_to(tmp_path / 'elsewhere')
    source = image_folder.source(tmp_path / 'pets', 'x', validation=0, test=0)
    assert found(source)['train'] == {'a/1.jpg': 0, 'a/more/2.jpg': 0, 'b/1.jpg': 1, 'c/2.jpg': 2}
    (tmp_path / 'pets/a/loop').symlink_to(tmp_path / 'pets/a')
    with pytest.raises(OSError, match='Too many levels of symbolic links'):
        image_folder.source(tmp_path / 'pets', 'x')


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    put(tmp_path, 'pets/a/1.jpg', 'pets/b/1.jpg')
    scandir = os.scandir

    def refuse(path):  # root may read everything
        if str(path).endswith('a'):
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(PermissionError, match=r'pets/a'):
        image_folder.source(tmp_path / 'pets', 'x')


def many(root, per_class):
    for label, count in per_class.items():
        put(root, *(f'{label}/{i}.jpg' for i in range(count)))
    return root


@pytest.mark.parametrize('inside', ['', 'train'])
def test_one_split_is_divided_class_by_class(tmp_path, inside):
    many(tmp_path / inside, {'a': 100, 'b': 20})
    splits = found(image_folder.source(tmp_path, 'x', validation=0.1, test=0.25))
    counts = {
        split: [list(labels.values()).count(label) for label in (0, 1)]
        for split, labels in splits.items()
    }
    assert counts == {'train': [65, 13], 'validation': [10, 2], 'test': [25, 5]}
    assert len(set().union(*splits.values())) == 120


def test_a_picture_stays_in_its_split_when_others_come(tmp_path):
    """Nearly all do: the border moves by as much as the class grows."""
    many(tmp_path, {'a': 200, 'b': 200})
    before = found(image_folder.source(tmp_path, 'x'))
    many(tmp_path, {'a': 210, 'b': 210})
    after = found(image_folder.source(tmp_path, 'x'))
    stayed = sum(len(before[split].keys() & after[split].keys()) for split in before)
    assert stayed >= 380


def test_no_share_no_split(tmp_path):
    many(tmp_path, {'a': 5, 'b': 5})
    assert found(image_folder.source(tmp_path, 'x', validation=0.2, test=0)).keys() == {
        'train',
        'validation',
    }


@pytest.mark.parametrize(
    ('folder', 'name', 'made'),
    [('My Pets', None, 'my_pets'), ('2024-pets', 'pets', 'pets'), ('été', None, 't')],
)
def test_names(tmp_path, folder, name, made):
    if folder == 'été':
        with pytest.raises(UsageError, match='--name'):
            image_folder.source(many(tmp_path / '2024', {'a': 5, 'b': 5}))
        return
    assert image_folder.source(many(tmp_path / folder, {'a': 5, 'b': 5}), name).name == made


@pytest.mark.parametrize('name', ['fashion_mnist', 'imagenet2012', 'Two Words', '9', 'a/b', '..'])
def test_names_that_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match='--name'):
        image_folder.source(many(tmp_path, {'a': 5, 'b': 5}), name)


@pytest.mark.parametrize(
    ('names', 'options', 'message'),
    [
        ((), {}, 'fewer than two classes'),
        (('a/1.jpg',), {}, 'fewer than two classes'),
        (('a/1.jpg', 'b/note.txt'), {}, r"no images of class 'b' .*: 1 \.txt\)"),
        (('train/a/1.jpg', 'train/b/1.jpg', 'val/c/1.jpg'), {}, "no images of class 'c' to train"),
        (('train/a/1.jpg', 'train/b/1.jpg', 'vallid/a/1.jpg'), {}, r'other folders .* \(vallid\)'),
        (('val/a/1.jpg', 'test/a/1.jpg'), {}, "no images of class 'a' to train"),
        (('a/1.jpg', 'b/1.jpg'), {'test': 0.6}, "no images of class 'a' to train"),
    ],
)
def test_folders_that_do_not_fit_together(tmp_path, names, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        image_folder.source(put(tmp_path, *names), 'x', **options)
    assert '\n' not in str(caught.value)
