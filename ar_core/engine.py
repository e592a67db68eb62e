"""The engine: requests in, steps, outputs out. It knows nothing of processes, sockets or text.

engine.add(Request("a", [Tokens(ids)], SamplingParams(max_tokens=16)))
while engine.has_work:
    for output in engine.step():
        print(output.request_id, output.tokens, output.finish)
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from ar_core.attention import make_backend
from ar_core.config import EngineConfig
from ar_core.device import pick_device
from ar_core.interfaces import Backbone, Emitted, Encoded, Head, OutputStage, SegmentEncoder, TokenEncoder
from ar_core.kv_pool import KVPool, affordable_slots
from ar_core.radix import RadixTree
from ar_core.request import FinishReason, Output, Request, RequestError, SamplingParams, TokenLogprob, Tokens
from ar_core.runner import Launched, Runner
from ar_core.scheduler import Scheduler
from ar_core.sequence import Sequence, State
from ar_core.stats import EngineStats

_CPU_STEP_TOKENS = 512
_CUDA_STEP_TOKENS = 8192


class Engine:
    """One model on one device.

    `encoders` say how segments become positions, by type; a head of width 1 brings one for token ids. `output_stage` is
    what happens to emitted rows before they leave (see `interfaces`).
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        config: EngineConfig,
        *,
        encoders: Mapping[type, SegmentEncoder] | None = None,
        output_stage: OutputStage | None = None,
    ) -> None:
        device = self.device = pick_device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the current device
        self.dtype = backbone.dtype
        num_slots = _num_slots(backbone, config, device)
        self.max_context = min(config.max_context or backbone.max_context, backbone.max_context, num_slots)
        self.vocab_size = backbone.vocab_size
        self.eos_token_ids = backbone.eos_token_ids
        self._width = head.width
        self._encoders: dict[type, SegmentEncoder] = dict(encoders or {})
        if head.width == 1:
            self._encoders.setdefault(Tokens, TokenEncoder(backbone.vocab_size))
        self._output_stage = output_stage
        self._overlap = device.type == "cuda" if config.overlap is None else config.overlap
        self.pool = KVPool(backbone.kv_layout, num_slots, backbone.dtype, device)
        self.tree = RadixTree()
        step_tokens = _CUDA_STEP_TOKENS if device.type == "cuda" else _CPU_STEP_TOKENS
        self.scheduler = Scheduler(
            self.pool,
            self.tree,
            max_running=config.max_running,
            max_queue=config.max_queue,
            max_step_tokens=config.max_step_tokens or step_tokens,
        )
        self._runner = Runner(
            backbone,
            head,
            make_backend(config.attention, self.pool),
            num_lanes=config.max_running + 1,
            max_context=self.max_context,
            device=device,
        )
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._launched: deque[Launched] = deque()
        self._aborted: list[Output] = []

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._launched or self._aborted)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it can never be served, QueueFull if not now."""
        if request.id in self._sequences:
            raise RequestError(f"request id {request.id!r} is in use", "id")
        self._check_ids(request)
        prompt = [self._encode(segment) for segment in request.segments]
        length = sum(len(part.keys) for part in prompt)
        if length == 0:
            raise RequestError("the prompt is empty; it must have at least one token", "prompt")
        if length >= self.max_context:
            raise RequestError(
                f"the prompt has {length} tokens; at most {self.max_context - 1} fit, since the context is "
                f"{self.max_context} and the answer needs at least one",
                "prompt",
            )
        params = request.sampling
        seed = secrets.randbits(64) if params.seed is None else params.seed
        limit = min(length + params.max_tokens, self.max_context)
        seq = Sequence(
            request,
            prompt,
            self._arrivals,
            limit=limit,
            width=self._width,
            seed=seed,
            stop_ids=self._stop_ids(params),
        )
        self.scheduler.add(seq)
        self._arrivals += 1
        self._sequences[request.id] = seq

    def abort(self, request_id: str) -> None:
        """End a request; its last output says ABORT. Unknown ids are ignored: the request may just have ended."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self._end(seq, FinishReason.ABORT)
            self._aborted.append(_output(seq, [], None, FinishReason.ABORT))

    def step(self) -> list[Output]:
        """Schedule and launch a step, then handle a finished one: the same, or with overlap the one before."""
        work = self.scheduler.schedule(may_preempt=not self._launched)
        if work:
            self._launched.append(self._runner.launch(work, self._banned()))
        outputs, self._aborted = self._aborted, []
        keep = 1 if self._overlap and work else 0
        while len(self._launched) > keep:
            outputs += self._handle(self._launched.popleft())
        return self._staged(outputs)

    def generate(self, requests: Iterable[Request], on_output: Callable[[Output], None] | None = None) -> list[Output]:
        """Serve requests to their ends:

        one Output each, in their order, with all that it emitted. For offline use, on an idle engine. Raises
        RequestError if one of them can never be served, and then leaves the engine idle.
        """
        todo = deque(requests)
        order = [request.id for request in todo]
        collected: dict[str, Output] = {}
        try:
            _check_distinct(order)
            while todo or self.has_work:
                while todo and len(self.scheduler.waiting) < self.scheduler.max_queue:
                    self.add(todo.popleft())
                for output in self.step():
                    before = collected.get(output.request_id)
                    collected[output.request_id] = output if before is None else _join(before, output)
                    if on_output is not None:
                        on_output(output)
        except RequestError:
            for request_id in order:
                self.abort(request_id)
            while self.has_work:
                self.step()
            raise
        return [collected[request_id] for request_id in order]

    def prompt_length(self, segments: Iterable[object]) -> int:
        """How many positions the segments make. Raises RequestError as `add` does."""
        return sum(len(self._encode(segment).keys) for segment in segments)

    def stats(self) -> EngineStats:
        return self.scheduler.snapshot()

    def _check_ids(self, request: Request) -> None:
        for name, ids in (
            ("logit_bias", request.sampling.logit_bias),
            ("stop_token_ids", request.sampling.stop_token_ids),
        ):
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise RequestError(f"{name} names token {token}; ids go from 0 to {self.vocab_size - 1}", name)

    def _encode(self, segment: object) -> Encoded:
        encoder = self._encoders.get(type(segment))
        if encoder is None:
            known = ", ".join(sorted(kind.__name__ for kind in self._encoders))
            raise RequestError(f"this model takes no {type(segment).__name__}; it takes {known}", "prompt")
        return encoder.encode(segment)

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else set(self.eos_token_ids))

    def _banned(self) -> dict[str, tuple[int, ...]]:
        """What would end a sequence may not be emitted before its min_tokens."""
        return {
            seq.id: tuple(seq.stop_ids)
            for seq in self.scheduler.running
            if seq.emitted <= seq.request.sampling.min_tokens != 0
        }

    def _handle(self, launched: Launched) -> list[Output]:
        """Take note of the rows that a step emitted, and end the sequences that they end."""
        emitted = launched.wait()
        outputs = []
        for i, (seq, row) in enumerate(zip(launched.emitting, emitted.rows.tolist(), strict=True)):
            if seq.state is State.FINISHED:  # ended while the step ran
                continue
            seq.append(row)
            self.scheduler.stats.generated_tokens += 1
            finish = self._finish_reason(seq, row[0])
            if finish is not None:
                self._end(seq, finish)
            outputs.append(_output(seq, [row], _logprobs(seq, emitted, i), finish))
        return outputs

    def _staged(self, outputs: list[Output]) -> list[Output]:
        if self._output_stage is None or not outputs:
            return outputs
        payloads = self._output_stage.process([(out.request_id, out.rows, out.finish) for out in outputs])
        return [replace(out, payload=payload) for out, payload in zip(outputs, payloads, strict=True)]

    def _finish_reason(self, seq: Sequence, token: int) -> FinishReason | None:
        if token in seq.stop_ids and seq.known - seq.prompt_len > seq.request.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if seq.known == seq.limit else None

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(seq, reason)
        del self._sequences[seq.id]


def _num_slots(backbone: Backbone, config: EngineConfig, device: torch.device) -> int:
    """How many positions the pool holds: as asked for, else what memory allows and the running sequences can use."""
    if config.kv_slots is not None:
        return config.kv_slots
    affordable = affordable_slots(backbone.kv_layout, backbone.dtype, device, config.memory_fraction)
    context = min(config.max_context or backbone.max_context, backbone.max_context)
    if affordable < 1:
        raise MemoryError(
            f"the weights leave no memory for KV within memory_fraction {config.memory_fraction} of {device}; "
            "a larger fraction, a smaller model or a larger device would"
        )
    return min(affordable, config.max_running * context)


def _check_distinct(ids: list[str]) -> None:
    repeated = next((name for name, times in Counter(ids).items() if times > 1), None)
    if repeated is not None:
        raise RequestError(f"request id {repeated!r} is given {ids.count(repeated)} times", "id")


def _output(
    seq: Sequence, rows: list[list[int]], logprobs: list[TokenLogprob] | None, finish: FinishReason | None
) -> Output:
    return Output(seq.id, rows, seq.prompt_len, seq.cached or 0, logprobs, finish=finish)


def _logprobs(seq: Sequence, emitted: Emitted, i: int) -> list[TokenLogprob] | None:
    wanted = seq.request.sampling.logprobs
    if wanted is None or emitted.logprob is None:
        return None
    assert emitted.top_ids is not None and emitted.top_logprobs is not None
    top = zip(emitted.top_ids[i, :wanted].tolist(), emitted.top_logprobs[i, :wanted].tolist(), strict=True)
    return [TokenLogprob(int(emitted.rows[i, 0]), float(emitted.logprob[i]), tuple(top))]


def _join(first: Output, then: Output) -> Output:
    logprobs = first.logprobs if then.logprobs is None else [*(first.logprobs or []), *then.logprobs]
    return replace(then, rows=first.rows + then.rows, logprobs=logprobs)
