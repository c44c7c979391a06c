"""What every section of a file that people write has in common."""

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["IllegalJob", "Section"]

NUMBERS = (int, float, int | None, float | None)


class IllegalJob(ValueError):
    """Values that are fine one by one and impossible together; ``hint`` says what to change."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


class Section(BaseModel):
    """Frozen, and a key it does not know is an error rather than a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_not_1(cls, values: object) -> object:
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field and field.annotation in NUMBERS:
                said = str(value).lower()
                raise IllegalJob(f"{key} = {said}: a number is wanted", f"mend {key}")
        return values
