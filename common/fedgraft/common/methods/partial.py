"""Partial fine-tuning: some weights of the backbone itself train."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fedgraft.common.errors import AdapterError
from fedgraft.common.methods.base import Anatomy, HeadPolicy, MethodSection
from fedgraft.common.methods.head import heads_alone
from fedgraft.common.section import IllegalJob

__all__ = ["PartialMethod"]


class PartialMethod(MethodSection):
    """``kind = "partial"``: some weights of the backbone train; the head has its own policy.

    The last ``blocks`` train as a whole. In addition, all normalisation layers or all biases can
    train (Ben Zaken et al. 2022, "BitFit").
    """

    kind: Literal["partial"]
    blocks: int = Field(default=1, ge=0, description="last blocks that train as a whole")
    norms: bool = Field(default=False, description="all normalisation layers train")
    biases: bool = Field(default=False, description="all biases train")
    head: HeadPolicy

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if not (self.blocks or self.norms or self.biases):
            raise IllegalJob("nothing of the backbone would train", 'blocks = 1, or kind = "head"')
        return self

    @property
    def opens_backbone(self) -> bool:
        """Return True: some weights of the backbone train."""
        return True

    def peft_config(self, model: Any, anatomy: Anatomy) -> Any:
        """Return a configuration with trainable copies of the opened modules and of each head.

        A frozen head gets no copy.

        Raises:
            AdapterError: the model has fewer blocks than should train.
        """
        trained = () if self.head == "frozen" else anatomy.heads
        config = heads_alone((*trained, *self._opened(model, anatomy)))
        config.bias = "all" if self.biases else "none"
        return config

    def _opened(self, model: Any, anatomy: Anatomy) -> list[str]:
        """Return the names of the backbone modules that train as a whole."""
        blocks = anatomy.blocks()
        if self.blocks > len(blocks):
            raise AdapterError(
                f"method.blocks = {self.blocks}: this backbone has {len(blocks)}",
                hint="fewer, or method.norms or method.biases",
            )
        opened = list(blocks[len(blocks) - self.blocks :])
        if self.norms:
            inside = tuple(f"{name}." for name in (*opened, *anatomy.heads))
            opened += [
                name
                for name, module in model.named_modules()
                if "Norm" in type(module).__name__  # torch and models have many such classes
                and any(True for _ in module.parameters(recurse=False))
                and not f"{name}.".startswith(inside)
            ]
        return opened
