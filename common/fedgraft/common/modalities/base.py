"""The interface of a modality: it checks one kind of cell and encodes rows of such cells."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from fedgraft.common.encoding import Keep, Rows, Settings
from fedgraft.common.errors import DataError, InputError
from fedgraft.common.examples import Examples, Indices, Inputs

__all__ = ["Modality", "Processor"]


class Processor(Protocol):
    """A converter from cells to inputs of one backbone: a tokenizer, an image processor..."""

    @property
    def identity(self) -> str:
        """Return a digest of everything that decides the result for a cell."""

    def configure(self, config: Any) -> None:
        """Write the processor's decisions (such as the padding token) into a model's config."""

    def blank(self, settings: Settings) -> Inputs:
        """Return one example of full length without content, to measure memory with."""

    def describe(self, settings: Settings) -> str:
        """Return a sentence for the model card; empty if there is nothing to say."""


class Modality(ABC):
    """A kind of input. ``name`` is also the column of the rows and the default of the job's key.

    ``kind`` is the kind of storage for a cell (``client.data.rows.KINDS``). ``files``: cells are
    files (embedded or by path), not values. ``one_file`` is the name of one file in error messages,
    ``several`` the report's word for several inputs. ``threads``: cells may be checked in threads.
    ``augmented``: ``[training.augmentation]`` has a section for the modality; otherwise
    ``unvaried`` gives the reason. ``keys`` are keys of ``[data]`` that only jobs with the modality
    have, with their defaults: names of columns, or numbers. ``named``: a label's name can be read
    as a cell, so a label can have a prototype without any example.
    """

    name: str
    kind: str = "file"
    files: bool = True
    several: str
    one_file: str
    threads: bool = False
    augmented: bool = False
    unvaried: str = "there is none for this modality"
    keys: Mapping[str, str | float] = MappingProxyType({})
    named: bool = False

    @abstractmethod
    def load(self, folder: Path, config: Any) -> Any:
        """Return the processor of the backbone in ``folder``, from local files only.

        ``config`` is the backbone's configuration as transformers reads it.

        Raises:
            BackboneError: the backbone has no processor, or its processor does not fit.
        """

    @abstractmethod
    def check(self, value: Any) -> None:
        """Check that a cell can be read.

        Raises:
            DataError: the cell is empty or cannot be decoded.
        """

    @abstractmethod
    def encode(
        self, rows: Rows, labels: Indices, processor: Any, settings: Settings, keep: Keep
    ) -> Examples:
        """Return the examples of ``rows`` with ``labels``, int64 [n].

        Raises:
            BackboneError: the settings do not fit the backbone.
            DataError: a file changed after it was read, or a text gives no tokens.
        """

    def samples(
        self,
        processor: Any,
        config: Any,
        settings: Settings,
        draw: np.random.Generator,
        shape: tuple[int, int],
    ) -> Inputs:
        """Return random inputs with the right names, shapes and types.

        ``shape`` is (examples, tokens), and ``config`` is the model's configuration. The trace of
        an ONNX graph needs such inputs.

        Raises:
            InputError: this modality has no ONNX export.
        """
        raise InputError(f"no ONNX export where {self.name} is read", hint="--format peft")

    def require(self, value: Any) -> Any:
        """Return ``value``, and check that the cell is not empty.

        Raises:
            DataError: the cell is empty.
        """
        if value is None:
            raise DataError(f"no {self.name}", hint="fill it in or remove the row")
        return value
