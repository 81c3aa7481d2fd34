"""Readers that turn files and Hugging Face data sets into document texts, one at a time."""

from __future__ import annotations

import glob
import gzip
import importlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distmuon.errors import DataError


class Document(NamedTuple):
    """One document as a reader found it; ``text`` is "" where there is nothing to train on."""

    text: str
    fields: tuple[str, ...] = ()
    """Names the record had to choose from."""
    held_out: bool | None = None
    """Whether the source itself puts the document in the validation split; None: it does not say."""


def optional(name: str, purpose: str) -> Any:
    """Import a package that only some sources need.

    Args:
        name: module name.
        purpose: what needs it, for the message.

    Returns:
        The module.

    Raises:
        DataError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{purpose} needs the package {name}; run: pip install 'distmuon[hf]'") from None


def matching_files(pattern: str) -> list[Path]:
    """Files a glob matches, in name order.

    Args:
        pattern: glob; ``**`` matches any directories and ``~`` is expanded.

    Returns:
        At least one absolute path.

    Raises:
        DataError: nothing matches.
    """
    names = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    paths = [Path(name).resolve() for name in names if os.path.isfile(name)]
    if not paths:
        raise DataError(f'the glob "{pattern}" matches no file; check the path and quote it in the shell.')
    return paths


def read_files(pattern: str, separator: str) -> Iterator[Document]:
    """Read plain UTF-8 text files.

    Args:
        pattern: glob.
        separator: text that ends a document inside a file; empty: one file, one document.

    Yields:
        The documents; those of white space only have no text.
    """
    for path in matching_files(pattern):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 at byte {error.start}; convert it to UTF-8.") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions.") from None
        for part in text.split(separator) if separator else [text]:
            yield Document(part if part.strip() else "")


def read_jsonl(pattern: str, field: str) -> Iterator[Document]:
    """Read one field of JSON lines, plain or gzip-compressed (``.gz``).

    Args:
        pattern: glob.
        field: name of the text field.

    Yields:
        The documents; null and white space only have no text.
    """
    for path in matching_files(pattern):
        number = 0
        try:
            with (
                gzip.open(path, "rt", encoding="utf-8")
                if path.suffix == ".gz"
                else path.open(encoding="utf-8") as lines
            ):
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _document(_json(line, f"{path}:{number}"), field, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 near line {number + 1} ({error}); repair the file.") from None
        except (OSError, EOFError) as error:
            raise DataError(f"{path} cannot be read ({error}); repair or replace the file.") from None


def read_parquet(pattern: str, field: str) -> Iterator[Document]:
    """Read one text column of Parquet files.

    Args:
        pattern: glob.
        field: name of the text column.

    Yields:
        The documents; null and white space only have no text.
    """
    parquet = optional("pyarrow.parquet", f'data.source "parquet:{pattern}"')
    lib = optional("pyarrow", f'data.source "parquet:{pattern}"')
    for path in matching_files(pattern):
        try:
            with parquet.ParquetFile(path) as file:
                names = list(file.schema_arrow.names)
                if field not in names:
                    raise DataError(_no_field(field, names, str(path)))
                for batch in file.iter_batches(batch_size=256, columns=[field]):
                    for value in batch.column(0).to_pylist():
                        yield _document({**dict.fromkeys(names), field: value}, field, str(path))
        except (lib.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file ({error}); replace it.") from None


def read_hf(target: str, field: str) -> Iterator[Document]:
    """Stream the "train" split of a Hugging Face data set, or of a local directory of data files.

    Args:
        target: ``NAME`` or ``NAME:CONFIG``.
        field: name of the text column.

    Yields:
        The documents; null and white space only have no text.
    """
    datasets = optional("datasets", f'data.source "hf:{target}"')
    name, _, config = target.partition(":")
    try:
        rows = datasets.load_dataset(os.path.expanduser(name), config or None, split="train", streaming=True)
        for row in rows:
            yield _document(row, field, f"hf:{target}")
    except DataError:
        raise
    except Exception as error:  # the hub client raises many unrelated types for "missing" and "offline"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f'data.source "hf:{target}" cannot be read ({reason}); check name, configuration and network, '
            "or log in with: hf auth login"
        ) from error


def _json(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        # Besides text that is no JSON: a number of thousands of digits, and as many brackets.
        raise DataError(f"{where} is not JSON ({error}); repair the line.") from None


def _document(row: object, field: str, where: str) -> Document:
    if not isinstance(row, Mapping):
        raise DataError(f'{where} holds a {type(row).__name__}, not an object with field "{field}".')
    if field not in row:
        raise DataError(_no_field(field, list(row), where))
    value = "" if row[field] is None else row[field]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f'field "{field}" of {where} holds {kind}, not text; name one of {", ".join(row)}.')
    return Document(value if value.strip() else "", tuple(row))


def _no_field(field: str, names: list[str], where: str) -> str:
    return f'{where} has no field "{field}"; name one of {", ".join(names) or "(none)"} after "#".'
