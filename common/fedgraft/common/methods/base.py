"""The interface of a method: its section of the job file, and the weights that it trains."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedgraft.common.section import Refuses, Section

__all__ = ["Anatomy", "HeadPolicy", "MethodSection"]

HeadPolicy = Literal["shared", "local", "frozen"]


@dataclass(frozen=True)
class Anatomy:
    """The names of a model's modules: its ``heads``, and its ``blocks`` from lowest to highest.

    ``task`` is PEFT's name of the job's task.
    """

    heads: tuple[str, ...]
    blocks: Callable[[], tuple[str, ...]]
    task: str | None


class MethodSection(Section):
    """``[method]`` of one ``kind``. ``head`` is the policy for the task's head.

    ``refuses`` of a kind is added to the refusals here, which hold for every method.
    """

    refuses: ClassVar[Refuses] = {
        "larger_ranks": (
            "simulation.ranks has {largest_rank}, more than the job's own rank",
            'leave simulation.ranks out: method.kind = "{method}" has no rank',
        ),
    }

    if TYPE_CHECKING:  # each kind declares both, in the order of the job file
        kind: str
        head: HeadPolicy

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Add the refusals of every method to those of this one."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.refuses = {**MethodSection.refuses, **cls.refuses}

    @property
    def low_rank(self) -> int:
        """Return the rank of LoRA's factors A and B; 0 if the method has no such pairs.

        A site of a smaller rank gets fewer components of these pairs (``layout.cut_rank``).
        """
        return 0

    @property
    def magnitudes(self) -> bool:
        """Return whether magnitudes of weights train separately from their directions (DoRA)."""
        return False

    @property
    def opens_backbone(self) -> bool:
        """Return whether weights of the backbone itself train."""
        return False

    def describe(self) -> str:
        """Return the method in a few words, for the model card."""
        return self.kind

    def peft_config(self, model: Any, anatomy: Anatomy) -> Any:
        """Return the PEFT configuration that adds the method to ``model``, a transformers model.

        Raises:
            AdapterError: the model has none of the modules that should train.
        """
        raise TypeError(f"{type(self).__name__} has no PEFT configuration")
