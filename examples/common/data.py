"""Loaders of public formats, words as numbers, and made-up data to see that a program runs."""

from __future__ import annotations

import collections
import csv
import gzip
import hashlib
import io
import re
import tarfile
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .options import ExampleError

PADDING, UNKNOWN = 0, 1


def read_bytes(path: Path) -> bytes:
    """Return a file's contents, unpacked if its name ends in .gz."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise ExampleError(f"--data: expected a readable file, got {path}: {error}") from None


def read_text(path: Path) -> str:
    """Return a text, lines ended by a newline alone whatever ends them in the file."""
    try:
        return read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ExampleError(f"--data: expected UTF-8, got {path}: {error}") from None


def read_tsv(path: Path, text: str, label: str = "label") -> tuple[list[str], list[int]]:
    """Return texts and labels of a tab-separated file with a heading, by the names of its columns."""
    reader = csv.DictReader(io.StringIO(read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
    for column in (text, label):
        if column not in (reader.fieldnames or ()):
            raise ExampleError(f"--data: expected a column {column!r}, got {reader.fieldnames} in {path}")
    rows = [(row[text] or "", row[label]) for row in reader]
    try:
        return [words for words, _ in rows], [int(value) for _, value in rows]
    except (TypeError, ValueError):
        raise ExampleError(f"--data: expected whole numbers in the column {label!r} of {path}") from None


def read_ag_news(path: Path) -> tuple[list[str], list[str], list[int]]:
    """Return titles, descriptions and labels 0 to 3 of AG's corpus: class (1 to 4), title, description."""
    rows = list(csv.reader(io.StringIO(read_text(path))))
    if not rows or any(len(row) != 3 or row[0] not in {"1", "2", "3", "4"} for row in rows):
        raise ExampleError(f"--data: expected rows of class (1 to 4), title and description, got others in {path}")
    # In the file a backslash stands for a line's end.
    titles, bodies = ([row[i].replace("\\", " ") for row in rows] for i in (1, 2))
    return titles, bodies, [int(row[0]) - 1 for row in rows]


def fetch(url: str, checksum: str, folder: Path) -> None:
    """Put the file at an address into a folder if it is not there, and unpack it if it is an archive.

    checksum: of the file, as "sha256:..." or "md5:...".
    """
    path = folder / url.rpartition("/")[2]
    if not path.exists():
        print(f"fetching {url}", flush=True)
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise ExampleError(
                f"--download: {url} cannot be had ({error}); fetch it elsewhere and give --data"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    algorithm, _, digest = checksum.partition(":")
    found = hashlib.new(algorithm, path.read_bytes()).hexdigest()
    if found != digest:
        raise ExampleError(f"--download: expected {path} with {checksum}, got {algorithm}:{found}; delete it")
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            top = folder / archive.getnames()[0].partition("/")[0]
            if not top.exists():
                archive.extractall(folder, filter="data")


def words_of(text: str) -> list[str]:
    """Return the words of an English text: lower case, digits and apostrophes among the letters."""
    return re.findall(r"[a-z0-9']+", re.sub(r"<[^>]*>", " ", text.lower()))


class Vocabulary:
    """Words as numbers: 0 is padding, 1 a word that is not known, then the most frequent words of a training part."""

    def __init__(self, texts: Iterable[Sequence[str]], most: int | None = None) -> None:
        counts = collections.Counter(word for text in texts for word in text)
        # Of equally frequent words the first in the alphabet, so that the numbers do not depend on the order of texts.
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        self.words = ["<padding>", "<unknown>", *ranked[: None if most is None else most - 2]]
        self._number = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: Sequence[str]) -> list[int]:
        return [self._number.get(word, UNKNOWN) for word in text]


def padded(sequences: Sequence[Sequence[int]], *, last: int | None = None) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T), zeros behind the end of each sequence, and lengths (B): at least 1 and at most `last`.

    Of longer sequences the last tokens are taken.
    """
    cut = [list(sequence[-last:] if last else sequence) or [PADDING] for sequence in sequences]
    lengths = torch.tensor([len(sequence) for sequence in cut])
    tokens = torch.zeros(len(cut), int(lengths.max()), dtype=torch.int64)
    for row, sequence in zip(tokens, cut, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return tokens, lengths


def padded_before(sequences: Sequence[Sequence[int]], steps: int) -> Tensor:
    """Return the last `steps` tokens of each sequence, (B, steps), zeros before shorter ones."""
    tokens = torch.zeros(len(sequences), steps, dtype=torch.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        if sequence:
            row[-min(steps, len(sequence)) :] = torch.tensor(sequence[-steps:])
    return tokens


def by_length(sequences: Sequence[Sequence[int]], size: int) -> list[Tensor]:
    """Return places of all sequences, `size` at a time, those of like length together: less padding."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return list(lengths.argsort(stable=True).split(size))


def made_up_texts(count: int, classes: int, seed: int, words: int = 12) -> tuple[list[str], list[int]]:
    """Return texts whose class can be learned: each class has words of its own among those that all have."""
    generator = torch.Generator().manual_seed(seed)
    texts, labels = [], []
    for i in range(count):
        label = i % classes
        length = int(torch.randint(3, words, (1,), generator=generator))
        drawn = torch.randint(0, 20, (length,), generator=generator).tolist()
        own = torch.rand(length, generator=generator).tolist()
        texts.append(" ".join(f"class{label}x{n % 5}" if p < 0.4 else f"word{n}" for n, p in zip(drawn, own)))
        labels.append(label)
    return texts, labels


def split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return indices of a training part and of the rest, `share` of all, drawn by seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = int(count * share)
    return order[held_out:], order[:held_out]
