"""The contract of a method: its section of the job file, and what trains of a model under it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedgraft.common.section import Refuses, Section

__all__ = ["Anatomy", "HeadPolicy", "MethodSection"]

HeadPolicy = Literal["shared", "local", "frozen"]


@dataclass(frozen=True)
class Anatomy:
    """Names of the modules of a model: its ``heads``, and its ``blocks``, the lowest first.

    ``task`` is how PEFT calls the job's task.
    """

    heads: tuple[str, ...]
    blocks: Callable[[], tuple[str, ...]]
    task: str | None


class MethodSection(Section):
    """``[method]`` of one ``kind``. ``head`` says what becomes of the task's head."""

    refuses: ClassVar[Refuses] = {}

    if TYPE_CHECKING:  # each kind declares them, in the order in which a job writes them
        kind: str
        head: HeadPolicy

    @property
    def low_rank(self) -> int:
        """The rank of the low-rank factors; 0 where the method has none."""
        return 0

    @property
    def magnitudes(self) -> bool:
        """Whether magnitudes of weights train apart from their directions (DoRA)."""
        return False

    @property
    def opens_backbone(self) -> bool:
        """Whether weights of the backbone itself train."""
        return False

    def describe(self) -> str:
        """The method in a few words, for the model card."""
        return self.kind

    def peft_config(self, model: Any, anatomy: Anatomy) -> Any:
        """PEFT's configuration that puts the method into ``model``, a model of transformers.

        Raises:
            AdapterError: the model has nothing of what should train.
        """
        raise TypeError(f"{type(self).__name__} has no PEFT configuration")
