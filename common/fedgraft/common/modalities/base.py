"""The contract of a modality: how one kind of cell is checked, and how rows of it are encoded."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedgraft.common.encoding import Keep, Rows, Settings
from fedgraft.common.errors import DataError, InputError
from fedgraft.common.examples import Examples, Indices, Inputs

__all__ = ["Modality", "Processor"]


class Processor(Protocol):
    """What turns cells into inputs of one backbone: a tokenizer, an image processor..."""

    @property
    def identity(self) -> str:
        """A digest of everything that decides what a cell becomes."""

    def configure(self, config: Any) -> None:
        """Tell a model's configuration what the processor decides, such as the padding token."""

    def blank(self, settings: Settings) -> Inputs:
        """One example of full length without content, to count memory with."""

    def describe(self, settings: Settings) -> str:
        """A sentence for the model card; empty where there is nothing to say."""


class Modality(ABC):
    """A kind of input. ``name`` is also the column of rows and the default of the job's key.

    ``kind`` is how rows store a cell (``client.data.rows.KINDS``).
    ``files``: cells are files, embedded or by path, rather than values. ``one_file`` and
    ``one_cell`` name one of them in errors. ``threads``: checking may run in threads.
    ``augmented``: ``[training.augmentation]`` has a section for it; else ``unvaried`` says so.
    """

    name: str
    kind: str = "file"
    files: bool = True
    one_cell: str
    one_file: str
    threads: bool = False
    augmented: bool = True
    unvaried: str = ""

    @abstractmethod
    def load(self, folder: Path, config: Any) -> Any:
        """The processor of the backbone in ``folder``, from local files alone.

        ``config`` is the backbone's configuration, as transformers understands it.

        Raises:
            BackboneError: it has none, or one that does not fit.
        """

    @abstractmethod
    def check(self, value: Any) -> None:
        """Check that a cell can be read.

        Raises:
            DataError: it is empty, or does not decode.
        """

    @abstractmethod
    def encode(
        self, rows: Rows, labels: Indices, processor: Any, settings: Settings, keep: Keep
    ) -> Examples:
        """The examples of ``rows`` with ``labels``, int64 [n].

        Raises:
            BackboneError: the settings do not fit the backbone.
            DataError: a file changed since it was read, or a text becomes no tokens.
        """

    def samples(
        self,
        processor: Any,
        config: Any,
        settings: Settings,
        draw: np.random.Generator,
        shape: tuple[int, int],
    ) -> Inputs:
        """Random inputs of the right names, shapes and types, of ``shape`` (examples, tokens).

        ``config`` is the model's. The trace of an ONNX graph needs them.

        Raises:
            InputError: there is no ONNX export of this modality.
        """
        raise InputError(f"no ONNX export where {self.name} is read", hint="--format peft")

    def require(self, value: Any) -> Any:
        """``value``, unless the cell is empty.

        Raises:
            DataError: it is empty.
        """
        if value is None:
            raise DataError(f"no {self.name}", hint="fill it in or remove the row")
        return value
