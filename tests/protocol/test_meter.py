from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocol.dialects import DIALECTS
from gateway.protocol.meter import KEPT, Meter
from gateway.protocol.usage import Usage
from gateway.protocol.vocabulary import vocabulary_of
from tests.protocol.test_recordings import Recording, index, recorded_usage, recordings
from tests.support.streams import play

pytestmark = pytest.mark.unit


def fed(*texts: str, prompt: tuple[str, ...] = ()) -> Meter:
    meter = Meter(prompt)
    for text in texts:
        meter.see(text, None, None)
    return meter


# --- the live estimate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("a", 1), ("1234567", 2), ("12345678", 3), ("日本語", 3), ("дом", 2), ("🦙🦙🦙", 5), ("\ud83d", 1)],
)
def test_a_text_is_estimated_by_its_characters_and_by_how_many_bytes_each_has(text: str, tokens: int) -> None:
    assert fed(text).completion_tokens == tokens


def test_a_piece_of_a_stream_is_never_less_than_a_token() -> None:
    assert fed(*"12345").completion_tokens == 5
    assert fed("1", "", "2").completion_tokens == 2


@given(st.lists(st.text(), max_size=20))
def test_the_live_count_moves_with_the_text_and_is_never_taken_back(texts: list[str]) -> None:
    meter, before = Meter([]), 0
    for number, text in enumerate(filter(None, texts), 1):
        meter.see(text, None, None)
        assert meter.completion_tokens >= max(before, number)
        before = meter.completion_tokens
    assert meter.bytes_out == len("".join(texts).encode("utf-8", "surrogatepass"))


def test_the_estimate_is_rarely_too_low_for_what_models_really_said(figure: Callable[[str], None]) -> None:
    """What was shown and what was billed: without tools, thoughts and searches, which are billed unseen."""
    ratios = sorted(estimated / billed for estimated, billed in said())
    if not ratios:
        figure("token estimate: the recordings are not present")
        assert not index()
        return
    quantiles = [ratios[int(len(ratios) * share)] for share in (0.05, 0.25, 0.5, 0.75, 0.95)]
    low = sum(ratio < 0.9 for ratio in ratios)
    shown = " ".join(f"{ratio:.2f}" for ratio in quantiles)
    figure(f"token estimate / billed, {len(ratios)} answers: 5/25/50/75/95 % {shown}; {low} more than 10 % too low")
    assert low / len(ratios) < 0.15
    assert 1.0 <= quantiles[2] <= 1.25


UNSEEN = ("tool", "think", "reason", "citation", "annotation", "audio", "block:", "logprobs", "moderation", "function")


def said() -> Iterator[tuple[int, int]]:
    """Tokens estimated and billed, of every recorded answer that is long enough to say something."""
    features = {row["file"]: " ".join(row["features"]) for row in index()}
    for recording in recordings():
        if recording.status != 200 or any(word in features[recording.file] for word in UNSEEN):
            continue
        usage, meter = recorded_usage(recording), read(recording)
        if usage is not None and usage[1] and not usage[4] and meter.bytes_out >= 100:
            yield meter.completion_tokens, usage[1]


def read(recording: Recording) -> Meter:
    """What the meter saw, without the usage."""
    call = recording.call()
    if recording.stream:
        return fed(*[chunk.text for chunk in play(call, [recording.body]).chunks])
    return fed(DIALECTS[recording.dialect].translator(call).reply(recording.body).text)


# --- the provider's figure ----------------------------------------------------------------------------------------


def test_the_providers_usage_replaces_the_count() -> None:
    meter = Meter(["ignored, because the provider says what the prompt was"])
    meter.see("one two three four", None, None)
    meter.see("", Usage(12, 4, 3, 2, 1), "stop")
    assert meter.result() == (Usage(12, 4, 3, 2, 1), "provider")
    assert meter.completion_tokens == 4


def test_the_last_usage_wins() -> None:
    meter = Meter([])
    meter.see("a", Usage(5, 1), None)
    meter.see("b", Usage(5, 2), None)
    meter.see("", None, None)
    assert meter.result() == (Usage(5, 2), "provider")


def test_text_after_a_usage_is_counted_until_the_next_usage() -> None:
    meter = Meter([])
    meter.see("", Usage(5, 0), None)
    for _ in range(10):
        meter.see("word", None, None)
    assert meter.completion_tokens >= 10
    assert meter.result()[1] == "estimated"
    meter.see("", Usage(5, 11), None)
    assert meter.result() == (Usage(5, 11), "provider")


def test_the_last_finish_reason_wins() -> None:
    meter = Meter([])
    for reason in (None, "length", "stop", None):
        meter.see("", None, reason)
    assert meter.finish_reason == "stop"


def test_the_prompt_is_not_read_when_the_provider_counted() -> None:
    def prompt() -> Iterator[str]:
        raise AssertionError("was read")
        yield ""

    meter = Meter(prompt())
    meter.see("", Usage(1, 1), None)
    assert meter.result() == (Usage(1, 1), "provider")
    assert meter.to_count() == []


# --- estimated ----------------------------------------------------------------------------------------------------


def test_a_prompt_is_estimated_with_four_tokens_around_each_message_and_three_before_the_answer() -> None:
    assert Meter(["1234567", "1234567"]).prompt_estimate() == 2 + 4 + 2 + 4 + 3
    assert Meter(iter(["日本"])).prompt_estimate() == 2 + 4 + 3
    assert Meter([]).prompt_estimate() == 0


def test_without_usage_both_sides_are_estimated() -> None:
    assert fed("12345", prompt=("1234567",)).result() == (Usage(9, 2), "estimated")


def test_a_prompt_that_the_provider_did_not_count_is_estimated_and_the_rest_kept() -> None:
    meter = Meter(["1234567"])
    meter.see("many more bytes than that", Usage(None, 3, reasoning_tokens=2), "stop")
    assert meter.result() == (Usage(9, 3, reasoning_tokens=2), "estimated")


def test_a_completion_that_the_provider_did_not_count_is_estimated_and_the_prompt_kept() -> None:
    meter = Meter(["1234567"])
    meter.see("12345", Usage(99, None, cached_tokens=64), None)
    assert meter.result() == (Usage(99, 2, cached_tokens=64), "estimated")


# --- counted ------------------------------------------------------------------------------------------------------


def test_what_the_provider_did_not_count_is_counted_and_the_row_says_so() -> None:
    meter = fed("Hello", " there", prompt=("Be brief.", "Say hello."))
    assert meter.to_count() == ["Be brief.", "Say hello.", "Hello there"]
    meter.take_counts([30, 40, 50])
    assert meter.result() == (Usage(30 + 4 + 40 + 4 + 3, 50), "counted")
    assert meter.completion_tokens == 50


def test_only_what_the_provider_did_not_say_is_counted() -> None:
    meter = Meter(["prompt"])
    meter.see("text", Usage(99, None, cached_tokens=64), None)
    assert meter.to_count() == ["text"]
    meter.take_counts([7])
    assert meter.result() == (Usage(99, 7, cached_tokens=64), "counted")

    meter = Meter(["prompt"])
    meter.see("text", Usage(None, 8), None)
    assert meter.to_count() == ["prompt"]
    meter.take_counts([5])
    assert meter.result() == (Usage(5 + 4 + 3, 8), "counted")


def test_the_texts_are_given_once_so_that_a_figure_that_was_told_does_not_change() -> None:
    meter = fed("text", prompt=("prompt",))
    assert len(meter.to_count()) == 2
    assert meter.to_count() == []
    assert meter.result()[1] == "estimated"


def test_an_answer_that_never_began_costs_its_prompt_alone() -> None:
    meter = Meter(["prompt"])
    assert meter.to_count() == ["prompt", ""]
    meter.take_counts([1, 0])
    assert meter.result() == (Usage(8, 0), "counted")


def test_halves_of_an_emoji_in_two_pieces_are_one_text_again() -> None:
    assert fed("\ud83d", "\ude00").to_count()[-1] == "\ud83d\ude00"


@pytest.mark.parametrize("character", ["a", "ж", "日", "🦙"])
def test_what_is_not_kept_of_a_long_text_is_taken_to_be_like_the_rest(character: str) -> None:
    streamed = fed(*[character * 1000] * 5000)
    whole = fed(character * 5_000_000)
    for meter in (streamed, whole):
        kept = meter.to_count()[-1]
        assert set(kept) == {character}
        assert KEPT / 5 < len(kept.encode()) <= KEPT
        meter.take_counts([len(kept)])
        assert meter.completion_tokens == 5_000_000


# --- vocabularies -------------------------------------------------------------------------------------------------


SINCE_GPT_4O = (
    "gpt-4o gpt-4o-2024-08-06 gpt-4.1-mini gpt-4.5-preview gpt-5.2 chatgpt-4o-latest o1 o1-mini o3 o3-mini-2025-01-31 "
    "o4-mini codex-mini-latest gpt-oss-120b GPT-4o ft:gpt-4o:us::1 openai/gpt-4o openai/o3 openai/gpt-4o-mini:free"
)
BEFORE = (
    "gpt-4 gpt-4-0613 gpt-4-turbo gpt-4-1106-preview gpt-3.5-turbo-0125 gpt-35-turbo openai/gpt-4 openai/gpt-4:extended "
    "ft:gpt-3.5-turbo:us::1"
)


@pytest.mark.parametrize("model", SINCE_GPT_4O.split())
def test_openais_models_since_gpt_4o_have_its_vocabulary(model: str) -> None:
    assert vocabulary_of(model) == "o200k_base"


@pytest.mark.parametrize("model", BEFORE.split())
def test_openais_older_models_have_the_one_before(model: str) -> None:
    assert vocabulary_of(model) == "cl100k_base"


@pytest.mark.parametrize(
    "model", ["claude-sonnet-4-5", "llama3", "mock-gpt", "o2", "o1js", "olmo-2", "anthropic/claude-opus-4", "", "gpt2"]
)
def test_other_makers_models_have_none_of_ours(model: str) -> None:
    assert vocabulary_of(model) is None
