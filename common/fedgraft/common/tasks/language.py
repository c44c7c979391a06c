"""The common part of tasks whose model predicts tokens: the head is the backbone's own head."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fedgraft.common.encoding import Settings
from fedgraft.common.errors import BackboneError
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.metrics.part_evaluation import TOKENS, PartMeasures
from fedgraft.common.modalities import MODALITIES
from fedgraft.common.section import Refuses
from fedgraft.common.tasks.base import Cell, Differences, Reading, Task

__all__ = ["TokenTask", "over_parts"]


def over_parts(parts: str, *, more: Refuses = MappingProxyType({})) -> Refuses:
    """Return the refusals that tasks without labels share.

    ``parts`` is the word for the predicted parts; ``more`` are further refusals of one task.
    """
    augmented = {
        f"augmentation.{kind}": (
            f"training.augmentation.{kind} means nothing for {{task}}",
            "leave it out: what is predicted is not to be varied",
        )
        for kind in ("image", "text", "audio")
    }
    return {
        "counts_beside": (
            f"{{task}} predicts {parts}, which have neither scores nor groups",
            "leave evaluation.score_bins, data.group and data.groups out",
        ),
        "heads": ("{task} has no labels to divide into heads", "leave job.heads out"),
        "distillation": (
            f"what a teacher says of all {parts} of {{task}} would not fit on a site's disk",
            "leave training.distillation out",
        ),
        "stop_by_macro_f1": (
            "{task} has no macro F1 to stop early by",
            'rounds.early_stopping.metric = "loss"',
        ),
        "dirichlet": (
            'partition.kind = "dirichlet" deals labels unevenly, and {task} has none',
            'simulation.partition = {{ kind = "natural" }}, one file or folder a site, or "iid"',
        ),
        "wrong_labels": (
            'faults.poison = "labels" gives sites wrong labels, and {task} has none',
            'simulation.faults.poison = "sign-flip", "noise" or "nan"',
        ),
        "domain": ("{task} has no labels that could be missing", "leave training.domain out"),
        "selection": (
            "{task} has no labels to score a backbone by",
            "a classification job; or compare runs with `fedgraft sweep`",
        ),
        "explanation": ("{task} has no explanations", "text- or image-classification"),
        **augmented,
        **more,
    }


class TokenTask(Task):
    """A task that predicts tokens of texts with the head from the backbone's pre-training."""

    modality = MODALITIES["text"]
    target = "tokens"
    head_trains = head_alone = False
    metrics = (TOKENS.metric, Metric("accuracy", "token accuracy", short="right"))
    card_metrics = (TOKENS.metric, Metric("accuracy", "accuracy"))
    card_note = (
        "Accuracy is of the next token. Perplexity depends on the tokenizer: it compares models "
        "of this backbone alone. "
    )
    examples = "blocks of text"
    person = "letters"
    intervals = (
        "Perplexity and token accuracy have bootstrap intervals over blocks of text, each redrawn "
        "with all of its tokens."
    )
    verdicts = (
        '"Helped" and "hurt" need both a paired permutation test over blocks of text below 5 % and '
        "a 95 % bootstrap interval of the difference in loss a token that excludes zero. Both "
        "models read the same blocks of text."
    )
    differences = Differences(
        "loss in nats a token, on the site's own test texts: below 0 the federated model is "
        "better. Below it its 95 % interval, by bootstrap over blocks",
        ("Loss", "Permutation p"),
        points=False,
    )
    refuses = over_parts(
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

    def measures(self, settings: Settings) -> PartMeasures:
        """Return the measures: the number of correct tokens and of all tokens."""
        return PartMeasures(settings.max_length, TOKENS)

    def no_head(self, source: str) -> BackboneError:
        """Return the error for a backbone without the head that it was pre-trained with."""
        return BackboneError(
            f"{source} was saved without the head that {self.name} predicts tokens with",
            hint="a backbone that still has it, such as the model that this one was made from",
        )
