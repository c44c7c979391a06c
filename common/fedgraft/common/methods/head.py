"""Head-only training: the backbone is a feature extractor, and only the head trains."""

from typing import Any, ClassVar, Literal

from fedgraft.common.methods.base import Anatomy, MethodSection
from fedgraft.common.section import Refuses

__all__ = ["HeadMethod", "heads_alone"]


class HeadMethod(MethodSection):
    """``kind = "head"``: the backbone is a feature extractor; only the shared head trains."""

    refuses: ClassVar[Refuses] = {
        "domain": (
            'method.kind = "head" leaves all features as they are: nothing could be aligned',
            'method.kind = "lora" or "partial", or no training.domain',
        ),
    }

    kind: Literal["head"]
    head: Literal["shared"] = "shared"

    def peft_config(self, model: Any, anatomy: Anatomy) -> Any:
        """Return a configuration with a trainable copy of each head and nothing else."""
        return heads_alone(anatomy.heads)


def heads_alone(heads: tuple[str, ...]) -> Any:
    """Return a PEFT configuration with trainable copies of ``heads`` and no low-rank factors."""
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES  # peft's marker for "no target module"

    return LoraConfig(r=1, target_modules=DUMMY_TARGET_MODULES, modules_to_save=list(heads))
