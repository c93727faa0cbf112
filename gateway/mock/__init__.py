"""A provider that answers without the internet: demo, tests and benchmarks all use it.

One server speaks three wire formats: OpenAI (`POST /v1/chat/completions`, `GET /v1/models`), Anthropic
(`POST /v1/messages`, `GET /v1/models` with an `anthropic-version` header) and Ollama (`POST /api/chat`,
`GET /api/tags`, `GET /api/version`). OpenAI's files, batches, images, audio and moderations are there as well: a file
is known by its size and digest, and the content of a large one is a pattern.
No model stands behind it. What it says was written in advance, and the same request always gets the same bytes.
A request that the real provider would refuse is refused in that provider's words. Any credential is accepted.

The models are mock-gpt, mock-claude and mock-llama. A query in the model's name directs the answer, and passes through
any gateway unchanged, as in `mock-gpt?case=tools&pace_ms=20&fault=cut&after=3`:

  case=CASE           what it answers with; without it the request decides (tools, images, thinking, structured output)
      text            the demo answer                       tools           a call of the first tool
      thinking        thoughts, then the answer             parallel_tools  a call of every tool
      json            a JSON object                         refusal         the model declines
      multibyte       many scripts, emoji, odd line ends    content_filter  the provider's filter stops it
      long            2,000 deltas                          length          cut by the token limit
      empty           no text at all
  tokens=N            N deltas of text, a token each
  pace_ms=M           milliseconds between deltas
  headers_ms=M        milliseconds of silence before the headers
  ttft_ms=M           milliseconds of silence after them
  prompt_tokens=N     the prompt count that usage shows; without it a token is four bytes
  cached_tokens=N     how many of them came from the provider's cache
  newline=NL          line ends of a stream: lf, crlf or cr
  split=N             writes N bytes at a time
  status=CODE         an error with this HTTP status; 401 quotes a key in its message, as providers do
  retry_after=S       seconds in its Retry-After header
  fault=FAULT         what goes wrong
  after=K             deltas before a fault inside a stream, 3 if not said
  times=N             fault and status strike only the first N requests for this model name

Faults before an answer:
      close_before_headers    the connection is closed      garbage         what comes is not HTTP
      reset_before_headers    the connection is reset       redirect        307 to /elsewhere
      html            200 with a web page                   empty           200 with no body
      broken_json     200 with half a JSON object
Faults inside one, after K deltas of a stream or half of a whole answer:
      reset           the connection is reset               truncate        closed without the final HTTP chunk
      cut             a clean end without the last words    stall           silence for ever
      error_event     the provider's own error              endless         one delta over and over
      bad_json        one event that is not JSON            bad_json_3      three of them in a row
      event_256k      an event of 256 KiB                   huge_event      an event of 2 MiB
Faults at its end:
      no_done         the last word is missing              no_usage        the counts are missing
      hang_open       said all, but the body stays open     gzip            compressed, whatever was asked for
      reset_after_reply       the connection is reset as soon as the answer is out
      reset_on_reuse          the connection is reset by the next request that comes on it

`GET /_mock/log` shows the last requests and the open connections, `DELETE /_mock/log` forgets them.
"""

from gateway.mock.log import Received
from gateway.mock.server import Mock, serve

HELP = __doc__

__all__ = ["HELP", "Mock", "Received", "serve"]
