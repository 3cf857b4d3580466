"""The llama.cpp engine: quantised GGUF files, through xllamacpp, which runs llama.cpp's server loop in this process.

llama.cpp tokenizes prompts by itself (a GGUF file holds the vocabulary, but every family of models cuts text in its own
way), batches what runs, and samples. Token ids come out of it, and text, stop strings and ends are made of them here as
for every engine. A reply is continued from its token ids.

Each running sequence has a thread that waits in llama.cpp; those are woken once a token.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import numpy as np
import psutil
import xllamacpp

from penstock.core.errors import (
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    ModelLoadError,
    PenstockError,
)
from penstock.core.events import Logprob, Prefix
from penstock.core.foreign import Malformed, decode
from penstock.core.job import Request
from penstock.core.ports import ModelInfo
from penstock.core.tasks import Tokenized
from penstock.engines.adapters import OPTION, adapter_names, check_files
from penstock.engines.child.backend import failed_output
from penstock.engines.child.choices import ThreadedChoices
from penstock.engines.child.output_queue import ThreadedBackend
from penstock.engines.frames import Progress
from penstock.engines.llama.gguf_text import UNKNOWN_ID, GgufText
from penstock.engines.llama.options import LlamaOptions
from penstock.engines.models import gguf_file
from penstock.engines.parts.guide import Guides, followed, lark_of
from penstock.engines.parts.kvcache import fit_context
from penstock.engines.parts.sampling import Floats, Sampler, stream_key
from penstock.engines.text.gguf import GgufFile
from penstock.engines.text.reply import Reply, told

#: How llama.cpp writes JSON that obeys a schema.
SEPARATORS = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
#: What a grammar begins with, for llama.cpp, that its library for schemas reads.
LARK = "%llguidance"
#: How many of the likeliest next tokens are looked at first for one that a schema allows.
CANDIDATES = 256
#: More tokens than a reply can have: how far penalties look back, and what keeps the random numbers of choices and of
#: continuations apart.
MAX_REPLY = 1 << 24
#: Tokens that a step computes at most: who is cancelled, or comes, is noticed between two steps.
BATCH = 512
#: Seconds for tokens of a prompt, whose size is bounded.
TOKENIZE_TIMEOUT = 20.0


# ------------------------------------------------------------------------------------------ sequences


class _Tokens(msgspec.Struct):
    """What llama.cpp's server answers to ``/tokenize``."""

    tokens: tuple[int, ...]


class LlamaBackend(ThreadedBackend):
    """See `penstock.engines.child.backend.Backend`."""

    def __init__(
        self, name: str, server: Any, key: str, text: GgufText, context: int, precision: str, options: LlamaOptions
    ) -> None:
        """*key* is what the *server* asks of who calls it over HTTP."""
        super().__init__()
        text.context_length = context
        self.slots = options.slots
        self.info = ModelInfo(
            name=name,
            engine="llama",
            context_length=context,
            precision=precision,
            vocab_size=text.vocab_size,
            chat=text.has_chat_template,
            no_chat=text.no_chat,
            tool_format=text.formats.tools,
            reasoning_format=text.formats.thoughts,
            tasks=("generate", "tokenize"),
        )
        self.server = server
        self._adapters = adapter_names({OPTION: options.adapters})
        self._key = key
        self.text = text
        text.tokens_of = self._tokens_of
        self._guides = Guides(text)
        self._threads = ThreadPoolExecutor(options.slots, "sequence")

    def add(self, key: int, request: Request, prefixes: list[Prefix], attempt: int) -> None:
        text = self.text
        prompt = text.pieces(request)
        text.check_ids(request.sampling)
        guides = [self._guides.begin(request) for _ in prefixes]
        prompt_tokens = None if request.prompt_ids is None else len(request.prompt_ids)
        self.requests[key] = choices = ThreadedChoices(key, len(prefixes), prompt_tokens)
        for choice, prefix in enumerate(prefixes):
            reply = text.reply(request, request.sampling.max_tokens, prefix.ids, guides[choice], prompt=prompt)
            if reply.finish is not None:
                if (last := choices.end(choice, reply.finish, reply.stop)) is not None:
                    self.queue.put(last)
                continue
            self._threads.submit(_ChoiceThread(self, choices, request, choice, reply, prefix).run, prompt)

    def adapters(self, request: Request) -> list[dict[str, Any]]:
        """How much of each LoRA adapter *request* wants: all of the one that it names as its model. llama.cpp computes
        requests of different adapters in turn, and shares no cache between them."""
        return [{"id": id, "scale": float(name == request.model)} for id, name in enumerate(self._adapters)]

    def tokenize(self, request: Request) -> Tokenized:
        ids: Sequence[int] | None = request.prompt_ids
        if ids is None:
            ids = self._tokens_of(self.text.pieces_to_tokenize(request), request.add_special_tokens)
        return self.text.named(self.text.known(ids, "tokens"))

    def _tokens_of(self, pieces: list[int | str], add_special: bool = False) -> list[int]:
        """xllamacpp has no call for this; llama.cpp's server, which listens in any case, has a route."""
        try:
            answer = httpx.post(
                f"{self.server.listening_address}/tokenize",
                json={"content": pieces, "add_special": add_special, "parse_special": True},
                headers={"Authorization": f"Bearer {self._key}"},
                timeout=TOKENIZE_TIMEOUT,
                trust_env=False,
            )
            return list(decode(answer.raise_for_status().content, _Tokens).tokens)
        except (httpx.HTTPError, Malformed) as error:
            raise EngineError(f"llama.cpp cannot tokenize this: {error}") from error


class _ChoiceThread:
    """One choice, in a thread of its own.

    llama.cpp draws its tokens. Where it cannot be told what they have to be, or would not tell all that is asked for of
    them, it gives the likeliest next tokens instead, again and again, and the choice is made here (`_choose`).
    """

    def __init__(
        self,
        backend: LlamaBackend,
        choices: ThreadedChoices,
        request: Request,
        choice: int,
        reply: Reply,
        prefix: Prefix,
    ) -> None:
        self._server = backend.server
        self._lora = backend.adapters(request)
        self._text = backend.text
        self._queue = backend.queue
        self._choices = choices
        self._request = request
        self._choice = choice
        self._reply = reply
        self._guide = guide = reply.guide
        #: Tokens that llama.cpp had from an earlier prompt when it was first asked; None: it was not yet.
        self._cached_tokens: int | None = None
        #: The reply so far, for a prompt that ends with it.
        self._said = [text if id == UNKNOWN_ID else id for id, text in zip(prefix.ids, prefix.texts, strict=True)]
        #: Whether tokens are drawn here. llama.cpp's grammars know only what it generates itself, and nothing of
        #: thoughts, and it has no way to forbid texts, or an end for a while.
        sampling = request.sampling
        guided_here = guide is not None and (self._said or reply.may_think)
        #: And it would take the rest of a character that its prompt begins for one that is broken.
        within = self._text.within_character(prefix.ids)
        self._here = bool(guided_here or sampling.bad_words or sampling.min_tokens or within)

    def run(self, prompt: list[int | str]) -> None:
        try:
            if not self._here and not self._choices.over:
                self._draw(prompt)
            if self._here and not self._choices.over:
                self._choose(prompt)
        except Exception as error:
            self._fail(error)

    def _prompt(self, prompt: list[int | str]) -> dict[str, Any]:
        # A list by itself could be taken for several prompts.
        return {"prompt_string": [*prompt, *(piece for piece in self._said if piece != "")]}

    # ------------------------------------------------------------------------------------ drawn by llama.cpp

    def _draw(self, prompt: list[int | str]) -> None:
        body = _body(self._request, self._choice, len(self._said))
        body |= {"prompt": self._prompt(prompt), "lora": self._lora}
        if (form := self._request.form) is not None:
            # It has the same library for this as we have, in a version to which separators are no patterns, and which
            # knows less; where it cannot compile something, it draws freely. What it allows counts only where ours
            # allows it too.
            if (schema := form.json_schema) is not None:
                body["json_schema"] = {**schema, "x-guidance": SEPARATORS}
            else:
                grammar = lark_of(form)
                body["grammar"] = grammar if grammar.startswith(LARK) else f"{LARK} {{}}\n{grammar}"
        self._behind = len(self._said)
        self._seen = 0  # tokens that it has drawn so far
        self._server.handle_completions(body, self._take)

    def _take(self, chunk: dict[str, Any]) -> bool:
        """One token from llama.cpp, or its last word. True: no more of it."""
        if self._choices.over or self._reply.finish is not None:
            return True
        try:
            self._read(chunk)
        except Exception as error:
            self._fail(error)
            return True
        return self._here or self._reply.finish is not None

    def _read(self, chunk: dict[str, Any]) -> None:
        if (error := chunk.get("error")) is not None:
            raise _error(error)
        choice, timings = chunk["choices"][0], chunk["timings"]
        prompt_tokens = self._given(timings) - self._behind
        swallowed = timings["predicted_n"] - self._seen
        self._seen += swallowed
        ids: list[int] = [UNKNOWN_ID] * swallowed
        entry = None
        if choice["logprobs"] is not None:
            entry = choice["logprobs"]["content"][-1]
            ids = [*self._text.swallowed(choice["text"], entry["id"], swallowed - 1), entry["id"]]
        elif choice["finish_reason"] is None:
            return  # progress
        count = self._request.sampling.logprobs
        if count is not None and len(ids) > (entry is not None):
            self._here = True  # those of swallowed tokens are not told
            return
        logprobs: list[Logprob | None] | None = None
        if count is not None and entry is not None:
            best = [(each["id"], each["logprob"]) for each in entry["top_logprobs"][:count]]
            logprobs = [self._text.logprob(entry["id"], entry["logprob"], best)]
        self._push(ids, logprobs, prompt_tokens)
        if self._here:
            return
        if self._reply.finish is None and choice["finish_reason"] is not None:
            self._reply.end("length" if choice["finish_reason"] == "length" else "stop")  # the context is full, mostly
        self._end()

    # ------------------------------------------------------------------------------------ drawn here

    def _choose(self, prompt: list[int | str]) -> None:
        text, sampling, reply, mask = self._text, self._request.sampling, self._reply, self._reply.mask
        sampler = Sampler(1, text.vocab_size)
        key = stream_key(sampling.seed, self._choice)
        # Log-probabilities are llama.cpp's own: those of a few candidates would not add up.
        unlogged = msgspec.structs.replace(sampling, logprobs=None)
        sampler.occupy(0, unlogged, key, reply=reply.ids, guide=mask)
        # A few may be enough, but not where an unlikely one may be raised, or what the guide leaves is a choice of few.
        few = not sampling.logit_bias and (self._guide is None or mask is self._guide)
        while reply.finish is None and not self._choices.over:
            for count in (CANDIDATES, text.vocab_size) if few else (text.vocab_size,):
                if (found := self._candidates(self._prompt(prompt), count)) is None:
                    return
                own, prompt_tokens = found
                allowed = own[0].copy()
                if mask is not None:
                    mask.mask(allowed)
                if np.isfinite(allowed).any():
                    break
            (token,), _ = sampler.draw(own.copy(), np.zeros(1, np.int64), np.array([len(reply.ids) + 1]))
            logprobs: list[Logprob | None] | None = None
            if sampling.logprobs is not None:
                likeliest = np.argsort(-own[0], kind="stable")[: sampling.logprobs]
                best = [(int(id), float(own[0, id])) for id in likeliest]
                logprobs = [text.logprob(token, float(own[0, token]), best)]
            self._push([token], logprobs, prompt_tokens - len(self._said))
            if reply.finish is None and prompt_tokens + 1 >= text.context_length:
                reply.end("length")
        self._end()

    def _candidates(self, prompt: dict[str, Any], count: int) -> tuple[Floats, int] | None:
        """The model's log-probabilities of its *count* likeliest next tokens ([1, vocabulary], -inf elsewhere), and how
        many tokens the prompt has. None where the request was aborted meanwhile."""
        body = {
            "prompt": prompt,
            "lora": self._lora,
            "stream": True,
            "n_predict": 1,
            "n_probs": count,
            "samplers": ["top_k"],
            "top_k": 1,
            # What it draws is of no interest, but half a character would not be told.
            "logit_bias": [[self._text.letter, 1000.0]],
            "timings_per_token": True,
            "return_progress": True,
        }
        told: dict[str, Any] = {}

        def take(chunk: dict[str, Any]) -> bool:
            if not told and ("error" in chunk or chunk["choices"][0]["logprobs"] is not None):
                told.update(chunk)
            return self._choices.over

        self._server.handle_completions(body, take)
        if not told:
            return None
        if (error := told.get("error")) is not None:
            raise _error(error)
        logits = np.full((1, self._text.vocab_size), -np.inf, np.float32)
        for entry in told["choices"][0]["logprobs"]["content"][-1]["top_logprobs"]:
            logits[0, entry["id"]] = entry["logprob"]
        return logits, self._given(told["timings"])

    def _given(self, timings: dict[str, Any]) -> int:
        """How many tokens llama.cpp was given, with all that it had of them already."""
        cached: int = timings["cache_n"]
        if self._cached_tokens is None:
            self._cached_tokens = cached
        return cached + int(timings["prompt_n"])

    # ------------------------------------------------------------------------------------ what comes of it

    def _push(self, ids: list[int], logprobs: list[Logprob | None] | None, prompt_tokens: int) -> None:
        """The next tokens, up to the reply's end, or to one that the guide does not allow: that, and what follows, is
        drawn anew, here."""
        reply, taken, texts, phases = self._reply, [], [], []
        for token in ids:
            if self._guide is not None and not self._guide.allows(token):
                self._here = True
                break
            text = reply.push(token)
            taken.append(token)
            texts.append(text)
            phases.append(reply.phase)
            self._said.append(text if token == UNKNOWN_ID else token)
            if reply.finish is not None:
                break
        logprobs = None if logprobs is None else logprobs[: len(taken)]
        if taken:
            cached = self._cached_tokens or 0
            self._queue.put(
                self._choices.output(self._choice, taken, texts, logprobs, told(phases), prompt_tokens, cached)
            )

    def _end(self) -> None:
        if self._reply.finish is None:
            return
        if (error := followed(self._guide)) is not None:
            self._fail(error)
        elif (last := self._choices.end(self._choice, self._reply.finish, self._reply.stop)) is not None:
            self._queue.put(last)

    def _fail(self, error: Exception) -> None:
        """End the request, and nobody else's: whatever one call meets, the engine goes on."""
        if not self._choices.over:
            self._choices.over = True
            self._queue.put(failed_output(self._choices.key, error))


def _body(request: Request, choice: int, before: int) -> dict[str, Any]:
    """The request in llama.cpp's words. Only the samplers that it needs run: each of them walks the vocabulary."""
    sampling = request.sampling
    samplers = []
    if sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0:
        samplers.append("penalties")
    if sampling.temperature > 0:
        # The order that every engine keeps: temperature before the filters.
        samplers.append("temperature")
        samplers += [
            name
            for name, on in (
                ("top_k", sampling.top_k > 0),
                ("top_p", sampling.top_p < 1),
                ("min_p", sampling.min_p > 0),
            )
            if on
        ]
    else:
        samplers.append("top_k")
    return {
        "stream": True,
        "n_predict": sampling.max_tokens - before,
        "samplers": samplers,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k if sampling.temperature > 0 else 1,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "min_keep": 1,
        # A continued reply is in the prompt, so penalties that look back on all of it see what they saw before. The
        # random numbers begin anew: they differ from those of the attempt before.
        "repeat_last_n": MAX_REPLY,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_penalty": sampling.repetition_penalty,
        "seed": stream_key(sampling.seed, choice * MAX_REPLY + before) & 0x7FFFFFFF,
        "logit_bias": [[token, bias] for token, bias in sampling.logit_bias.items()],
        "ignore_eos": sampling.ignore_eos and request.form is None,
        # The ids of tokens come with their probabilities. Those after sampling are cheap, the model's own are not.
        "n_probs": max(1, sampling.logprobs or 0),
        "post_sampling_probs": sampling.logprobs is None,
        "timings_per_token": True,
        # A chunk for each batch of the prompt: between two of them it asks whether somebody still wants it.
        "return_progress": True,
    }


def _error(error: Mapping[str, Any]) -> PenstockError:
    message = str(error.get("message", error))
    if error.get("type") == "exceed_context_size_error":
        return ContextLengthExceeded.of("prompt", int(error.get("n_prompt_tokens", 0)), int(error.get("n_ctx", 0)))
    if error.get("type") == "invalid_request_error":
        return InvalidRequest(f"llama.cpp refuses the request: {message}")
    return EngineError(f"llama.cpp failed: {message}")


# ------------------------------------------------------------------------------------------ loading


def load(name: str, path: str | None, options: LlamaOptions, progress: Progress) -> LlamaBackend:
    """See `penstock.engines.child.backend.Loader`."""
    file = gguf_file(name, path, progress)
    progress("reading the file", None)
    metadata = GgufFile(file)
    adapters = check_files(options.adapters)
    text = GgufText.of(metadata)
    text.use_formats(options.tool_format, options.reasoning_format)
    context = _context(metadata, options)
    progress("loading the weights", None)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_parallel = options.slots
    params.n_batch = params.n_ubatch = BATCH
    params.n_ctx = context * options.slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads or psutil.cpu_count(False) or 1
    params.n_gpu_layers = options.gpu_layers
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters.values()]
    params.lora_init_without_apply = bool(adapters)
    params.verbosity = 1
    # llama.cpp listens for HTTP in any case: let nobody in.
    params.hostnames = ["127.0.0.1"]
    params.api_keys = [key := secrets.token_urlsafe(32)]
    params.ui = params.endpoint_slots = False
    try:
        server = xllamacpp.Server(params)
    except Exception as error:  # whatever its C++ throws
        raise ModelLoadError(f"llama.cpp cannot load {file}: {error}") from error
    return LlamaBackend(name, server, key, text, context, metadata.precision, options)


def _context(metadata: GgufFile, options: LlamaOptions) -> int:
    """Tokens of one slot's context."""
    heads = metadata.of_model("attention.head_count", 1)
    kv_heads = metadata.of_model("attention.head_count_kv", heads)
    heads, kv_heads = (max(each) if isinstance(each, list) else each for each in (heads, kv_heads))
    head = metadata.of_model("embedding_length", 0) // heads
    sizes = metadata.of_model("attention.key_length", head) + metadata.of_model("attention.value_length", head)
    token_bytes = metadata.of_model("block_count", 1) * kv_heads * sizes * 2  # float16
    trained = int(metadata.of_model("context_length", 2048))
    return fit_context(trained, options.context, options.slots, token_bytes, options.cache_gb)
