"""How a pretrained captioner captions: every choice made, and checked against its family."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from captioner.errors import InputError
from captioner.model.huggingface.families import Family

__all__ = ["TASKS", "GenerationSettings"]

#: What a prompt of Florence-2 may be.
TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Everything besides the model and the image that decides a caption.

    None stands for the model's own value. A ``temperature`` of 0 takes the likeliest caption; above
    0, captions are sampled, and ``captions`` says how many for each image.
    """

    prompt: str | None = None
    system_prompt: str | None = None
    beam: int | None = None
    length_penalty: float | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float | None = None
    seed: int = 0
    captions: int = 1
    attention: Literal["auto", "tokens", "mean", "none"] = "auto"

    def resolved(self, family: Family) -> "GenerationSettings":
        """These settings with the family's defaults.

        Raises:
            InputError: the family has no such option, or two options exclude each other.
        """
        self._check_prompt(family)
        if self.attention in ("tokens", "mean") and family.maps is None:
            raise InputError(f"{family.name} has no attention maps: use --attention none")
        if self.temperature and (self.beam or 1) > 1:
            raise InputError(
                f"--temperature {self.temperature:g} samples captions, but --beam {self.beam} "
                "searches for the likeliest: remove one of them"
            )
        if not self.temperature:
            for option, value, default in (
                ("--top-p", self.top_p, 1.0),
                ("--captions", self.captions, 1),
            ):
                if value != default:
                    raise InputError(
                        f"{option} {value:g} needs sampling: add for example --temperature 0.7"
                    )
        values = asdict(self)
        if self.prompt is None and family.prompt is not None:
            values["prompt"] = family.default_prompt
        if self.attention == "auto":
            values["attention"] = family.default_attention
        if self.max_new_tokens is None:
            values["max_new_tokens"] = family.new_tokens
        if self.temperature:
            values["beam"] = 1
        return GenerationSettings(**values)

    def _check_prompt(self, family: Family) -> None:
        if self.prompt is not None and family.prompt is None:
            raise InputError(f"{family.name} takes no prompt: remove --prompt")
        if self.prompt is not None and family.prompt == "task" and self.prompt not in TASKS:
            raise InputError(
                f"--prompt {self.prompt!r}: {family.name} takes a task: one of {', '.join(TASKS)}"
            )
        if self.system_prompt is not None and family.prompt != "chat":
            raise InputError(f"{family.name} takes no system prompt: remove --system-prompt")

    def identity(self) -> dict[str, Any]:
        """The settings that decide a row, for a job's fingerprint."""
        return asdict(self)
