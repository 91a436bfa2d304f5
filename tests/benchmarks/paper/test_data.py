"""The readers, on small files in the published formats that the tests write themselves."""

from __future__ import annotations

import gzip
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from benchmarks.paper.data import Dataset, Examples, MissingData, standardised
from benchmarks.paper.data.cifar import CIFAR10, CIFAR100, read_binary, read_pickled
from benchmarks.paper.data.images import shifted_and_flipped
from benchmarks.paper.data.mnist import FILES, MNIST, MNIST_IMAGES, read_idx
from benchmarks.paper.data.parallel_text import MULTI30K
from benchmarks.paper.data.svhn import SVHN, read_mat
from benchmarks.paper.data.text import ENGLISH, WINDOW, windows
from benchmarks.paper.data.uci import PARKINSONS, PROTEIN, read_table
from benchmarks.paper.data.vocabulary import CLOSE, OPEN, PAD, UNKNOWN, Vocabulary
from benchmarks.paper.data.without_files import CONDITION, ill_conditioned_map
from benchmarks.paper.tasks import TASKS

RANDOM = np.random.default_rng(0)


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def test_idx_plain_and_gzipped(tmp_path: Path) -> None:
    images, labels = RANDOM.integers(0, 256, (3, 28, 28)), np.array([7, 0, 9])
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, values in zip(FILES, (images, labels, images[:1], labels[:1]), strict=True):
        if name.startswith("train"):
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))
    data = MNIST.load(tmp_path)
    assert torch.equal(data.train.inputs[0] * 255, torch.tensor(images).flatten(1).float())
    assert data.train.targets.tolist() == [7, 0, 9]
    assert data.label == "MNIST (a part: 3 + 1 of 60,000 + 10,000)"
    assert torch.equal(MNIST_IMAGES.load(tmp_path).test.targets, data.test.inputs[0])


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\1\0\0\0\1abcd", b"\0\0\x08\1\0\0\0\5abcd", b"\0\0\x08\3\0\0"])
def test_idx_refuses_what_is_no_such_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="images must"):
        read_idx(path)


def test_missing_files_are_named_with_where_they_are_published(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=r"train-images-idx3-ubyte.*--data DIR.*lecun"):
        MNIST.load(None)
    with pytest.raises(MissingData, match=r"CASP\.csv.*is missing.*archive\.ics\.uci\.edu"):
        PROTEIN.load(tmp_path)
    with pytest.raises(MissingData, match=r"data_batch_1\.bin.*test_batch.*kriz"):
        CIFAR10.load(tmp_path)
    with pytest.raises(MissingData, match="must be a folder"):
        PROTEIN.load(tmp_path / "nowhere")
    for task in TASKS.values():
        if task.source.files:
            with pytest.raises(MissingData, match="http"):
                replace(task.source, without=None).load(None)
            with pytest.raises(MissingData, match="http"):
                task.data(tmp_path)


def records(labels: np.ndarray, images: np.ndarray) -> bytes:
    return np.concatenate([labels.reshape(len(images), -1), images], 1).astype(np.uint8).tobytes()


def test_cifar_binary_and_pickled_agree(tmp_path: Path) -> None:
    images, labels = RANDOM.integers(0, 256, (5, 3072), dtype=np.uint8), np.array([3, 1, 4, 1, 5])
    binary, pickled = tmp_path / "a" / "cifar-10-batches-bin", tmp_path / "b" / "cifar-10-batches-py"
    for folder in (binary, pickled):
        folder.mkdir(parents=True)
    for name, part in (("data_batch_1", slice(0, 2)), ("data_batch_3", slice(2, 4)), ("test_batch", slice(4, 5))):
        (binary / f"{name}.bin").write_bytes(records(labels[part], images[part]))
        content = {b"data": images[part], b"labels": labels[part].tolist(), b"batch_label": b"x"}
        (pickled / name).write_bytes(pickle.dumps(content, protocol=2))
    one, other = CIFAR10.load(tmp_path / "a"), CIFAR10.load(tmp_path / "b")
    assert torch.equal(one.train.inputs[0], other.train.inputs[0])
    assert one.train.targets.tolist() == other.train.targets.tolist() == [3, 1, 4, 1]
    assert one.test.targets.tolist() == [5]
    assert "a part: 4 + 1 of 50,000" in one.label
    raw, _ = read_binary(binary / "data_batch_1.bin")
    # red, green and blue planes, each row by row
    assert torch.equal(raw[1, 2, 3], torch.tensor(images[1, 2048 + 96 : 2048 + 128]))
    x = one.train.inputs[0]
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(3), atol=1e-3)


def test_cifar_100_takes_the_fine_label(tmp_path: Path) -> None:
    images, labels = RANDOM.integers(0, 256, (2, 3072), dtype=np.uint8), np.array([[1, 88], [2, 99]])
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name in ("train.bin", "test.bin"):
        (folder / name).write_bytes(records(labels, images))
    assert CIFAR100.load(tmp_path).train.targets.tolist() == [88, 99]


def test_a_pickle_that_runs_a_program_is_refused(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, ("1/0",)

    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Bad()}))
    with pytest.raises(ValueError, match=r"which is no array"):
        read_pickled(path)
    path.write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="must be a batch"):
        read_pickled(path)
    (tmp_path / "x.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="3073 bytes, but holds 3"):
        read_binary(tmp_path / "x.bin")


def test_svhn(tmp_path: Path) -> None:
    X = RANDOM.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        savemat(tmp_path / name, {"X": X, "y": np.array([[1], [10], [9], [10]])})
    images, labels = read_mat(tmp_path / "train_32x32.mat")
    assert labels.tolist() == [1, 0, 9, 0]  # 10 is the digit 0
    assert images[2, 1, 5, 7] == X[5, 7, 1, 2]
    assert SVHN.load(tmp_path).train.inputs[0].shape == (4, 3, 32, 32)
    savemat(tmp_path / "train_32x32.mat", {"X": X})
    with pytest.raises(ValueError, match="must hold X"):
        read_mat(tmp_path / "train_32x32.mat")


def test_windows_of_text(tmp_path: Path) -> None:
    text = "A dög,\n~" + "".join(chr(32 + i % 95) for i in range(3 * WINDOW))
    examples = windows(text)
    (inputs,) = examples.inputs
    assert inputs.shape == examples.targets.shape == (3, WINDOW)
    assert inputs[0, :8].tolist() == [34, 1, 69, 0, 72, 13, 0, 95]  # what isn't printable ASCII is 0
    assert torch.equal(inputs.flatten()[1:], examples.targets.flatten()[:-1])
    (tmp_path / "train.en").write_text("Two dogs run.\n" * 400)
    data = ENGLISH.load(tmp_path)
    assert (len(data.train), len(data.test)) == (79, 8)
    assert ENGLISH.load(None).label.startswith("Python's help texts, a stand-in for Multi30k")


def test_uci_tables(tmp_path: Path) -> None:
    rows = RANDOM.normal(size=(50, 3))
    lines = ["F1,RMSD,F2", *(",".join(map(repr, map(float, row))) for row in rows)]
    (tmp_path / "CASP.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    data = PROTEIN.load(tmp_path)
    x, t = data.train.inputs[0], data.train.targets
    assert (len(x), len(data.test)) == (40, 10)
    assert torch.allclose(x.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(t.std(0), torch.ones(1), atol=1e-5)
    # the columns are told apart, and inputs and targets belong together
    raw = torch.tensor(rows)[torch.randperm(50, generator=torch.Generator().manual_seed(0))[:40]]
    scaled = ((raw - raw.mean(0)) / raw.std(0)).float()
    assert torch.allclose(x, scaled[:, [0, 2]], atol=1e-5)
    assert torch.allclose(t, scaled[:, [1]], atol=1e-5)
    header = "subject#,age,motor_UPDRS,total_UPDRS,PPE"
    (tmp_path / "parkinsons_updrs.data").write_text("\n".join([header, *["1,70,3.5,4.5,0.1", "2,60,1.5,2.5,0.2"] * 5]))
    assert PARKINSONS.load(tmp_path).train.inputs[0].shape == (8, 2)  # neither the person nor the other score


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_uci_tables_parted_by_other_signs(tmp_path: Path, separator: str) -> None:
    lines = (separator.join(cells) for cells in (("a", "RMSD", "b"), ("1", "2.5", "3"), ("4", "5", "6e-1")))
    (tmp_path / "x.txt").write_text("\n".join(lines))
    features, targets = read_table(tmp_path / "x.txt", "RMSD")
    assert features.tolist() == [[1, 3], [4, 0.6]]
    assert targets.tolist() == [[2.5], [5]]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a,b\n1,2", "must have a column 'RMSD'"),
        ("RMSD,b\n1,2\n1,x", "must hold rows of numbers below its header.*row 1, column 2"),
        ("RMSD,b\n1,2,3", "must hold rows of 2 numbers, but holds 1 of 3"),
        ("RMSD,b\n1,2\n1", "columns changed from 2 to 1"),
        ("RMSD,b\n", "must hold rows of 2 numbers, but holds 0"),
    ],
)
def test_uci_refuses_what_is_no_table(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=error):
        read_table(tmp_path / "x.csv", "RMSD")


SENTENCES = ["Zwei Männer gehen.", "Zwei Hunde gehen, und zwei Katzen.", "Zwei Männer  sehen 12 Hunde!"]


def test_words_come_back_as_they_were() -> None:
    words = Vocabulary(SENTENCES * 3, 60)
    assert len(words) <= 60
    for sentence in SENTENCES:
        assert words.decode([OPEN, *words.encode(sentence), CLOSE, 5, 6]) == " ".join(sentence.split())
    assert UNKNOWN in words.encode("Zwei Ωmega")
    assert len(words.encode("Zwei Männer")) < len("ZweiMänner")


def test_pairs_are_merged_by_frequency() -> None:
    """Sennrich et al.'s Algorithm 1, done by counting everything anew for each merge."""
    sentences = ["lower lowest newer newest wider lower low low new", "abab ab aaa aaaa ba bab"]
    words = Vocabulary(sentences, 40)
    counted: dict[tuple[str, ...], int] = {}
    for part in ("▁" + " ▁".join(" ".join(sentences).split())).split():
        counted[tuple(part)] = counted.get(tuple(part), 0) + 1
    expected = []
    while len(words.merges) > len(expected):
        pairs: dict[tuple[str, str], int] = {}
        for word, count in counted.items():
            for i in range(len(word) - 1):
                pairs[word[i], word[i + 1]] = pairs.get((word[i], word[i + 1]), 0) + count
        most = max(pairs.values())
        a, b = min(pair for pair, count in pairs.items() if count == most)
        expected.append((a, b))
        merged: dict[tuple[str, ...], int] = {}
        for word, count in counted.items():
            new, i = [], 0
            while i < len(word):
                if word[i : i + 2] == (a, b):
                    new.append(a + b)
                    i += 2
                else:
                    new.append(word[i])
                    i += 1
            merged[tuple(new)] = merged.get(tuple(new), 0) + count
        counted = merged
    assert len(expected) > 10
    assert list(words.merges) == expected


def test_parallel_text(tmp_path: Path) -> None:
    english = ["Two men walk.", "Two dogs walk, and two cats.", "Two men see 12 dogs!"]
    for name, lines in (("train", 3), ("test_2016_flickr", 1)):
        (tmp_path / f"{name}.de").write_text("\n".join(SENTENCES[:lines]), encoding="utf-8")
        (tmp_path / f"{name}.en.gz").write_bytes(gzip.compress("\n".join(english[:lines]).encode()))
    data = MULTI30K.load(tmp_path)
    source, given = data.train.inputs
    words = data.extra.vocabulary
    assert words.decode(source[1].tolist()) == SENTENCES[1]
    assert given[2, 0] == OPEN
    # what is said next: the same shifted by one, and CLOSE at the end
    length = int((given[0] != PAD).sum())
    assert torch.equal(given[0, 1:length], data.train.targets[0, : length - 1])
    assert data.train.targets[0, length - 1] == CLOSE
    assert torch.equal(given != PAD, data.train.targets != PAD)
    assert data.extra.references == (english[0],)
    (x, y), t = data.train.batch(torch.tensor([0]))
    assert x.shape[1] == int((source[0] != PAD).sum())
    assert y.shape == t.shape == (1, length)
    other = shutil.copytree(tmp_path, tmp_path / "other")
    (other / "train.de").write_text("one line")
    with pytest.raises(ValueError, match=r"train.de and train.en.gz must have as many lines, but have \[1, 3\]"):
        MULTI30K.load(other)


def test_the_map_is_as_ill_conditioned_as_it_says() -> None:
    values = torch.linalg.svdvals(ill_conditioned_map(torch.Generator().manual_seed(0)))
    assert values[0].item() == pytest.approx(1)
    assert values[-1].item() == pytest.approx(1 / CONDITION, rel=1e-4)
    assert torch.allclose(values[1:] / values[:-1], torch.tensor(0.01, dtype=torch.float64), rtol=1e-4)


def test_shifts_and_flips_move_whole_images() -> None:
    x = torch.arange(64 * 3 * 8 * 8, dtype=torch.float32).reshape(64, 3, 8, 8) + 1
    (y,) = shifted_and_flipped((x,), torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    seen = set()
    for image, moved in zip(padded, y, strict=True):
        found = [
            (i, j, flip)
            for i in range(9)
            for j in range(9)
            for flip in (False, True)
            if torch.equal(moved.flip(-1) if flip else moved, image[:, i : i + 8, j : j + 8])
        ]
        assert found
        seen.update(found)
    assert {i for i, _, _ in seen} == {j for _, j, _ in seen} == set(range(9))
    assert {flip for _, _, flip in seen} == {False, True}


def test_standardised_by_the_training_examples_alone() -> None:
    train, test = torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[2.0, 5.0], [4.0, 6.0]])
    x, y = standardised(train, test)
    assert x[:, 1].tolist() == [0, 0]
    assert y[0].tolist() == [0, 0]
    assert y[1, 0].item() == pytest.approx(2 / 2**0.5)


def test_held_out_examples_are_no_longer_trained_on() -> None:
    x = torch.arange(40.0)
    data = Dataset("x", Examples((x,), x), Examples((-x,), -x)).held_out(0.25)
    train, test = set(data.train.targets.tolist()), set(data.test.targets.tolist())
    assert (len(train), len(test)) == (30, 10)
    assert train | test == set(x.tolist())
