"""What `stream_options` asks for: token counts inside a stream."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from streaming.http.errors import bad_request
from streaming.http.generation import Generation
from streaming.http.requests import GenerationBody
from streaming.http.schema import Usage


@dataclass(frozen=True, slots=True)
class StreamUsage:
    at_end: bool  # a last chunk without choices
    in_chunks: bool

    @staticmethod
    def of(body: GenerationBody) -> StreamUsage:
        """Raises ApiError if there are options for a stream but no stream."""
        options = body.stream_options
        if options is None:
            return StreamUsage(False, False)
        if not body.stream:
            raise bad_request("stream_options are given; they need stream to be true", "stream_options")
        return StreamUsage(bool(options.include_usage), bool(options.continuous_usage_stats))

    def so_far(self, generation: Generation) -> Usage | UnsetType | None:
        """The `usage` of a chunk that is not the last: null, as OpenAI has it, if only the end is asked for."""
        if self.in_chunks:
            return generation.usage
        return None if self.at_end else UNSET
