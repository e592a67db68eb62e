"""The bodies that clients send. Types are strict; fields that are not named here are accepted and ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_PROMPTS = 1024

_INT64 = 2**63
_Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
_StopString = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="End the stream with a chunk that holds the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Put the usage so far into every chunk.")


class GenerationBody(Body):
    """What chat and completions have in common."""

    model: str = Field(description="One of the names that GET /v1/models lists.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="How many answers.")
    max_tokens: int | None = Field(None, ge=1, le=2**31, description="Default: what is left of the context.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: _StopString | Annotated[list[_StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    user: str | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 or 0: no limit.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    min_tokens: int | None = Field(None, ge=0, le=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    cache_salt: str | None = Field(
        None, max_length=256, description="Only requests with equal salts share cached prefixes."
    )
    priority: _Int32 | None = Field(None, description="Of waiting requests the lowest value starts first.")

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ContentPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: text for content, and no field that was not sent."""
        content = self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content or ())
        rest = self.model_dump(exclude_none=True, include={"name", "tool_calls", "tool_call_id"})
        return {"role": "system" if self.role == "developer" else self.role, "content": content, **rest}


class ResponseFormat(Body):
    type: str = Field(description='"text" is what is supported.')


class TemplateBody(Body):
    """What turns messages into a prompt."""

    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the chat template.")
    add_generation_prompt: bool | None = Field(None, description="Default true: the answer starts a new message.")


class ChatRequest(GenerationBody, TemplateBody):
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    modalities: list[str] | None = None
    continue_final_message: bool | None = None


class CompletionRequest(GenerationBody):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | _TokenIds
        | Annotated[list[_TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    suffix: str | None = None


class TokenizeRequest(TemplateBody):
    """Give `prompt` or `messages`."""

    model: str
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, fail_fast=True)
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str
    tokens: list[TokenId] = Field(fail_fast=True)
