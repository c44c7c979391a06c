"""The training methods: one file for each method, and the table of all methods.

A method decides which weights of a model train, and so which weights travel.
"""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from fedgraft.common.methods.base import Anatomy, HeadPolicy, MethodSection
from fedgraft.common.methods.head import HeadMethod
from fedgraft.common.methods.lora import LoraMethod
from fedgraft.common.methods.partial import PartialMethod

__all__ = ["METHODS", "Anatomy", "HeadMethod", "HeadPolicy", "Method", "MethodSection"]

METHODS: dict[str, type[MethodSection]] = {
    "lora": LoraMethod,
    "head": HeadMethod,
    "partial": PartialMethod,
}

if TYPE_CHECKING:
    Method = MethodSection
else:
    Method: Any = reduce(or_, METHODS.values())  # a union; ``kind`` selects the member
