"""The common part of tasks whose model predicts tokens: the head is the backbone's own head."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedgraft.common.encoding import Settings
from fedgraft.common.examples import Inputs
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.metrics.part_evaluation import TOKENS, PartMeasures
from fedgraft.common.modalities import MODALITIES, Processor
from fedgraft.common.modalities.text import TextProcessor
from fedgraft.common.tasks.base import Cell, Differences, Reading, Task
from fedgraft.common.tasks.refusals import without_classes

__all__ = ["PERPLEXITY", "TokenTask"]

PERPLEXITY = "Perplexity depends on the tokenizer: it compares models of this backbone alone. "


class TokenTask(Task):
    """A task that predicts tokens of texts with the head from the backbone's pre-training."""

    modality = MODALITIES["text"]
    target = "tokens"
    head_trains = head_alone = False
    metrics = (TOKENS.metric, Metric("accuracy", "token accuracy", short="right"))
    card_metrics = (TOKENS.metric, Metric("accuracy", "accuracy"))
    card_note = f"Accuracy is of the next token. {PERPLEXITY}"
    examples = "texts"
    blocks: bool = True
    """True if a text is cut into blocks; otherwise what is beyond the cut is lost."""
    reads_types: bool = False
    """True if the model reads the ``token_type_ids`` that a tokenizer gives."""
    intervals = (
        "Perplexity and token accuracy have bootstrap intervals over texts, each redrawn "
        "with all of its tokens."
    )
    verdicts = (
        '"Helped" and "hurt" need both a paired permutation test over texts below 5 % and '
        "a 95 % bootstrap interval of the difference in loss a token that excludes zero. Both "
        "models read the same texts."
    )
    differences = Differences(
        "loss in nats a token, on the site's own test texts: below 0 the federated model is "
        "better. Below it its 95 % interval, by bootstrap over texts",
        ("Loss", "Permutation p"),
        points=False,
    )
    refuses = without_classes(
        "tokens",
        more={
            "trained_head": (
                "the head of {task} is the backbone's own, as large as its vocabulary",
                'method.kind = "lora" with method.head = "frozen"',
            ),
            "head_dropout": (
                "training.dropout acts inside a head that trains, and that of {task} is frozen",
                "training.dropout = 0; method.dropout acts on the low-rank path",
            ),
        },
    )

    def outputs(self, config: Any) -> int:
        """Return the size of the model's vocabulary."""
        return int(getattr(config, "vocab_size", 1))

    def read(self, cell: Cell, reading: Reading) -> dict[str, Any]:
        """Return label 0: the tokens to predict are in the text itself."""
        return {"label": 0}

    def write(self, row: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
        """Return an empty dictionary."""
        return {}

    def blank(self, processor: Processor, settings: Settings) -> Inputs:
        """Return one text of full length, as the model reads it."""
        inputs = processor.blank(settings)
        read = self.reads_types
        return {name: value for name, value in inputs.items() if read or name != "token_type_ids"}

    def describe_input(self, processor: Processor, settings: Settings) -> str:
        """Return a text about the cut of texts."""
        assert isinstance(processor, TextProcessor)  # noqa: S101  # the text modality's processor
        return processor.describe(settings, blocks=self.blocks)

    def measures(self, settings: Settings) -> PartMeasures:
        """Return the measures: the number of correct tokens and of all tokens."""
        return PartMeasures(settings.max_length, TOKENS)
