"""What answers that a provider need not make are counted by: kept, shared, replayed and resumed ones."""

from gateway import labels
from gateway.page import Page
from gateway.series import MAX_SERIES

MAX_SAVING_PAIRS = MAX_SERIES // 20  # of a model and a provider: few models are asked the same thing twice


class Savings(Page):
    """A page with that on it; who counts is metrics.py, and those who keep, share and resume."""

    def __init__(self) -> None:
        super().__init__()
        self.cache_requests = self._counter(
            "gateway_cache_requests_total",
            "Requests that might be remembered: answered from the cache (hit), with one in flight (shared) or as one of"
            " the same Idempotency-Key was (replay); asked of a provider and to be kept (miss), or not to be (bypass).",
            ("result",),
            labels.CACHE_RESULTS,
        )
        self.cache_answers = self._counter(
            "gateway_cache_answers_total",
            "Answers that were to be kept, by what became of them: kept; not worth it (unfit); too_large; the queue was"
            " full; or the database was gone (failed).",
            ("result",),
            labels.KEPT_RESULTS,
        )
        self.resumable_streams = self._counter(
            "gateway_resumable_streams_total",
            "Streams that were to be resumable: held by Redis; refused, as the key has too many that run; Redis was"
            " gone (failed); or gone for so long in the middle that other processes have only a part of it (lost).",
            ("result",),
            labels.RESUMABLE_RESULTS,
        )
        self.resumed_streams = self._counter(
            "gateway_resumed_streams_total",
            "Requests to continue a stream: with the one that runs here (joined), from Redis (followed); unknown, or"
            " another key's; refused, as such a part of it is not kept; Redis was gone (failed); broken in the middle.",
            ("result",),
            labels.RESUMED_RESULTS,
        )
        self.saved_tokens = self._counter(
            "gateway_saved_tokens_total",
            "Tokens of prompts and completions that no provider was paid for, because an answer was there already.",
            ("model", "provider"),
            cap=MAX_SAVING_PAIRS,
        )
        self.saved_cost_micros = self._counter(
            "gateway_saved_cost_micros_total",
            "Micro-dollars that those would have cost, where a price is known.",
            ("model", "provider"),
            cap=MAX_SAVING_PAIRS,
        )
