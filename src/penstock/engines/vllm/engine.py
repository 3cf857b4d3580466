"""The vLLM engine: vLLM's scheduler, paged attention and sampler, in the engine process itself.

vLLM's own server talks to its engine core through sockets and a second process. Ours is an engine process already, so
the core runs inside it (``VLLM_ENABLE_V1_MULTIPROCESSING=0``) and its ``step`` is our step: no hand-over per token, and
nothing that could outlive the process. With ``tensor_parallel_size`` above 1 vLLM starts its workers as processes,
which die with it.

vLLM gets token ids and gives token ids. Text, stop strings and the end of a reply are `penstock.engines.text`'s, as for
every engine. A reply is continued as a prompt that ends with the logged tokens; what vLLM would begin anew with it is
carried over: the grammar of a guided reply is fed the logged tokens, and presence and frequency penalties count them
(`penstock.engines.vllm.penalties`). Random numbers are not: see `sampling_params`.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil

from penstock.core.bounds import check_form
from penstock.core.errors import EngineError, InvalidRequest, ModelLoadError, Unsupported
from penstock.core.events import Logprob, Prefix
from penstock.core.job import Request, ResponseFormat
from penstock.core.ports import ModelInfo, Output
from penstock.core.tasks import Tokenized
from penstock.engines.adapters import CONFIG, check_folders
from penstock.engines.child.backend import Backend, failed_output
from penstock.engines.child.choices import Choices
from penstock.engines.frames import Progress
from penstock.engines.models import weights_folder
from penstock.engines.parts.sampling import stream_key
from penstock.engines.text.model import TextModel, read_json
from penstock.engines.text.reply import Reply, told
from penstock.engines.vllm import INSTALL
from penstock.engines.vllm.options import VLLMOptions

#: How much of the machine's memory the cache may take by default where the model runs on the CPU.
CACHE_SHARE = 0.25
#: Sequences at once by default: on a CPU more of them only wait for each other.
CPU_SLOTS, GPU_SLOTS = 64, 256
#: Seconds between two looks at grammars that are being compiled in a thread, when there is nothing else to do.
COMPILE_WAIT = 0.001


# ------------------------------------------------------------------------------------------ the seam to vLLM


class Sampled(msgspec.Struct, array_like=True):
    """What a step drew for one sequence. ``logprobs``: for each token (id, log-probability, rank), the drawn one among
    them. ``finish``: vLLM's word for why it stopped, None while it goes on. ``cached_tokens``: of what it was begun
    with."""

    id: str
    tokens: list[int]
    logprobs: list[list[tuple[int, float, int]]] | None = None
    finish: str | None = None
    cached_tokens: int = 0


class Core(Protocol):
    """What this engine asks of vLLM."""

    counts_prefix: bool
    """Can it be told which tokens of a prompt are the reply's (see `sampling_params`)?"""

    def add(
        self, id: str, prompt: list[int], params: dict[str, Any], guide: Any, logged: int, adapter: int = 0
    ) -> None:
        """Begin a sequence. *guide*: what it must obey, as arguments of vLLM's ``StructuredOutputsParams``, or None;
        the last *logged* tokens of *prompt* are the reply's beginning; *adapter*: the number of its LoRA adapter, from
        1 on, 0 for none. Raises ValueError for what vLLM refuses."""
        ...

    def abort(self, ids: list[str]) -> None: ...

    def step(self) -> list[Sampled]: ...


def sampling_params(
    request: Request, choice: int, limit: int, prefix: list[int], ends: frozenset[int], counts_prefix: bool
) -> dict[str, Any]:
    """The arguments of vLLM's ``SamplingParams`` for one choice of *request*, continued behind *prefix*.

    A seed gives every choice and every place of resumption random numbers of its own: vLLM's generator begins anew with
    a request, and would otherwise repeat those that the reply began with.
    """
    sampling = request.sampling
    params: dict[str, Any] = {
        "max_tokens": limit - len(prefix),
        "temperature": sampling.temperature,
        "ignore_eos": True,  # vLLM knows one end token; the model may have several
        "stop_token_ids": sorted(ends.union(sampling.stop_token_ids)),
    }
    if (least := sampling.min_tokens - len(prefix)) > 0:
        params["min_tokens"] = least
    if sampling.bad_words:
        params["bad_words"] = list(sampling.bad_words)
    if sampling.temperature > 0:
        params |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
        if sampling.seed is not None:
            seed = stream_key(sampling.seed, choice)
            params["seed"] = stream_key(seed, len(prefix)) if prefix else seed
    penalties = {
        name: value
        for name, value, neutral in (
            ("presence_penalty", sampling.presence_penalty, 0.0),
            ("frequency_penalty", sampling.frequency_penalty, 0.0),
            ("repetition_penalty", sampling.repetition_penalty, 1.0),
        )
        if value != neutral
    }
    if prefix and penalties.keys() - {"repetition_penalty"} and counts_prefix:
        params["extra_args"] = {"logged": len(prefix), **penalties}
    else:  # the repetition penalty counts the prompt too
        params |= penalties
    if sampling.logit_bias:
        params["logit_bias"] = dict(sampling.logit_bias)
    if sampling.logprobs is not None:
        params["logprobs"] = sampling.logprobs
    return params


def _guide(form: ResponseFormat) -> dict[str, Any]:
    """A `Request.form` as arguments of vLLM's ``StructuredOutputsParams``. Raises `InvalidRequest` for an empty or too
    large one."""
    check_form(form, "response_format")
    if (schema := form.json_schema) is not None:
        return {"json": schema}
    if form.type == "choice":
        return {"choice": list(form.choices)}
    return {"regex": form.pattern} if form.type == "regex" else {"grammar": form.grammar}


# ------------------------------------------------------------------------------------------ the backend


class _RunningChoice:
    """A choice that vLLM knows as ``id``. *top*: alternatives that are asked for."""

    __slots__ = ("choice", "choices", "guided", "id", "reply", "top")

    def __init__(self, choices: Choices, choice: int, reply: Reply, top: int, guided: bool) -> None:
        self.choices = choices
        self.choice = choice
        self.id = f"{choices.key}-{choice}"
        self.reply = reply
        self.top = top
        self.guided = guided

    @property
    def compiling(self) -> bool:
        """Is it perhaps its grammar that it waits for?"""
        return self.guided and not self.choices.reported


class VLLMBackend(Backend):
    """See `penstock.engines.child.backend.Backend`."""

    def __init__(
        self, name: str, text: TextModel, core: Core, slots: int, precision: str, adapters: tuple[str, ...] = ()
    ) -> None:
        self.slots = slots
        self._adapters = adapters
        self.info = ModelInfo(
            name=name,
            engine="vllm",
            context_length=text.context_length,
            precision=precision,
            vocab_size=text.vocab_size,
            chat=text.has_chat_template,
            no_chat=text.no_chat,
            tool_format=text.formats.tools,
            reasoning_format=text.formats.thoughts,
            tasks=("generate", "tokenize"),
        )
        self._text = text
        self._core = core
        self._open: set[int] = set()  # keys of requests that have not ended
        self._running: dict[str, _RunningChoice] = {}
        self._complete: list[Output] = []  # of requests that were complete before they began

    # ---------------------------------------------------------------------------- Backend

    def add(self, key: int, request: Request, prefixes: list[Prefix], attempt: int) -> None:
        text, sampling, form = self._text, request.sampling, request.form
        guide = None if form is None else _guide(form)
        prompt = text.encode_request(request)
        text.check_ids(sampling)
        if guide is not None:
            if not text.eos_ids:
                raise Unsupported(
                    "This model has no end token, so it cannot end a reply of a given form.", param="response_format"
                )
            if text.opens_thought(request, prompt):
                raise Unsupported(
                    "This model thinks before it writes, and vLLM would hold the thought to the form too. Turn "
                    "thinking off (chat_template_kwargs: enable_thinking false), or serve it with another engine.",
                    param="response_format",
                )
            # The grammar allows nothing but the end token once the text is complete.
            sampling = msgspec.structs.replace(sampling, ignore_eos=False)
        ends = frozenset() if sampling.ignore_eos else text.eos_ids
        asked = msgspec.structs.replace(request, sampling=sampling)
        limit = min(sampling.max_tokens, text.context_length - len(prompt))
        adapter = self._adapters.index(request.model) + 1 if request.model in self._adapters else 0
        choices = Choices(key, len(prefixes), len(prompt))
        try:
            for choice, prefix in enumerate(prefixes):
                reply = text.reply(asked, limit, prefix.ids, prompt=prompt)
                running = _RunningChoice(choices, choice, reply, sampling.logprobs or 0, guide is not None)
                if reply.finish is None:
                    params = sampling_params(request, choice, limit, prefix.ids, ends, self._core.counts_prefix)
                    self._core.add(running.id, prompt + prefix.ids, params, guide, len(prefix.ids), adapter)
                    self._running[running.id] = running
                elif (last := choices.end(choice, reply.finish, reply.stop)) is not None:
                    self._complete.append(last)
        except ValueError as error:  # a schema that its grammar compiler does not know, above all
            self._drop(key)
            raise InvalidRequest(
                f"vLLM refuses this request: {error}", param=None if guide is None else "response_format"
            ) from error
        self._open.add(key)

    def tokenize(self, request: Request) -> Tokenized:
        return self._text.tokenize(request)

    def abort(self, key: int) -> None:
        self._open.discard(key)
        self._drop(key)
        self._complete = [output for output in self._complete if output.key != key]

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def step(self) -> list[Output]:
        outputs = {output.key: output for output in self._complete}
        self._complete.clear()
        if self._running:
            self._advance(outputs)
        self._open.difference_update(output.key for output in outputs.values() if output.finish is not None)
        return list(outputs.values())

    def _advance(self, outputs: dict[int, Output]) -> None:
        """Run vLLM once; what comes of it goes to *outputs*, by key."""
        drawn = self._core.step()
        if not drawn and all(running.compiling for running in self._running.values()):
            time.sleep(COMPILE_WAIT)
        stopped: list[str] = []
        for sampled in drawn:
            running = self._running.get(sampled.id)
            if running is None:
                continue  # aborted
            reply, choices = running.reply, running.choices
            output = outputs.setdefault(choices.key, Output(choices.key))
            output.extend(self._take(running, sampled))
            if reply.finish is not None:
                if sampled.finish is None:
                    stopped.append(sampled.id)
                del self._running[sampled.id]
                if (last := choices.end(running.choice, reply.finish, reply.stop)) is not None:
                    output.extend(last)
            elif sampled.finish is not None:
                output.extend(self._failed(running, sampled.finish))
        if stopped:
            self._core.abort(stopped)

    # ---------------------------------------------------------------------------- what came of a step

    def _take(self, running: _RunningChoice, sampled: Sampled) -> Output:
        reply, ids, texts, phases = running.reply, [], [], []
        logprobs: list[Logprob | None] | None = None if sampled.logprobs is None else []
        for i, token in enumerate(sampled.tokens):
            texts.append(reply.push(token))
            phases.append(reply.phase)
            ids.append(token)
            if sampled.logprobs is not None and logprobs is not None:
                logprobs.append(self._logprob(token, sampled.logprobs[i], running.top))
            if reply.finish is not None:
                break
        cached = sampled.cached_tokens
        return running.choices.output(running.choice, ids, texts, logprobs, told(phases), cached_tokens=cached)

    def _logprob(self, token: int, entries: list[tuple[int, float, int]], top: int) -> Logprob:
        drawn = next(value for id, value, rank in entries if id == token)
        best = sorted((entry for entry in entries if entry[2] <= top), key=lambda entry: entry[2])
        return self._text.logprob(token, drawn, [(id, value) for id, value, _ in best])

    def _failed(self, running: _RunningChoice, reason: str) -> Output:
        """vLLM gave a choice up, and with it the request."""
        key = running.choices.key
        del self._running[running.id]
        self._drop(key)
        if running.guided and reason == "error":
            error = EngineError(
                "vLLM cannot hold the reply to its form: it has no grammar for it, or what was already written of the "
                "reply does not obey it."
            )
        else:
            error = EngineError(f"vLLM gave the request up: {reason}.")
            error.retryable = True
        return failed_output(key, error)

    def _drop(self, key: int) -> None:
        """Stop what runs of a request."""
        ids = [running.id for running in self._running.values() if running.choices.key == key]
        for id in ids:
            del self._running[id]
        if ids:
            self._core.abort(ids)

    def warm_up(self) -> None:
        """One greedy and one drawn reply, so that nothing is compiled in a user's."""
        for temperature in (0.0, 0.7):
            sampling = {"max_tokens": 4, "temperature": temperature, "top_k": 20, "top_p": 0.9, "ignore_eos": True}
            request = msgspec.convert({"model": self.info.name, "prompt_ids": [0, 0], "sampling": sampling}, Request)
            self.add(-1, request, [Prefix([], [])], 1)
            while self.busy:
                self.step()


# ------------------------------------------------------------------------------------------ vLLM itself


class VLLMCore:
    """`Core` over vLLM's ``LLMEngine`` with the engine core in this process."""

    def __init__(self, engine: Any, counts_prefix: bool, adapters: Mapping[str, Path]) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        self.counts_prefix = counts_prefix
        self._engine = engine
        # vLLM's prefix cache tells them apart by their names.
        self._adapters = {
            number: LoRARequest(name, number, str(folder)) for number, (name, folder) in enumerate(adapters.items(), 1)
        }
        for adapter in self._adapters.values():
            engine.add_lora(adapter)  # now, so that one that does not fit is told at the start
        self._tokens_input = tokens_input
        self._params = SamplingParams
        self._guide = StructuredOutputsParams
        self._refusal = VLLMClientError
        self._fixed = {"detokenize": False, "output_kind": RequestOutputKind.DELTA, "skip_clone": True}

    def add(
        self, id: str, prompt: list[int], params: dict[str, Any], guide: Any, logged: int, adapter: int = 0
    ) -> None:
        given = self._params(**params, **self._fixed)
        if guide is not None:
            given.structured_outputs = self._guide(**guide)
        try:
            inner = self._engine.add_request(
                id, self._tokens_input(prompt), given, lora_request=self._adapters.get(adapter)
            )
        except self._refusal as error:
            raise ValueError(str(error)) from error
        if guide is not None and logged:
            request = self._engine.engine_core.engine_core.scheduler.requests[inner].structured_output_request
            request.grammar = _advanced(request._grammar, inner, prompt[-logged:])

    def abort(self, ids: list[str]) -> None:
        self._engine.abort_request(ids)

    def step(self) -> list[Sampled]:
        return [
            Sampled(
                output.request_id,
                part.token_ids,
                part.logprobs and _entries(part.logprobs),
                part.finish_reason,
                output.num_cached_tokens or 0,
            )
            for output in self._engine.step()
            for part in output.outputs
        ]


def _entries(logprobs: Any) -> list[list[tuple[int, float, int]]]:
    return [[(id, entry.logprob, entry.rank) for id, entry in position.items()] for position in logprobs]


def _advanced(compiling: Any, id: str, tokens: list[int]) -> Future[Any]:
    """The grammar that *compiling* will give, behind *tokens*. vLLM waits for it before it schedules the request."""
    result: Future[Any] = Future()

    def advance(compiled: Future[Any]) -> None:
        try:
            grammar = compiled.result()
            if not all(grammar.accept_tokens(id, [token]) for token in tokens):  # as they were drawn
                raise ValueError("The logged beginning of the reply does not have its form.")
            result.set_result(grammar)
        except Exception as error:
            result.set_exception(error)

    if not isinstance(compiling, Future):
        done: Future[Any] = Future()
        done.set_result(compiling)
        compiling = done
    compiling.add_done_callback(advance)
    return result


def load(name: str, path: str | None, options: VLLMOptions, progress: Progress) -> VLLMBackend:
    """See `penstock.engines.child.backend.Loader`."""
    folder = weights_folder(name, path, progress)
    text = TextModel.load(folder)
    text.use_formats(options.tool_format, options.reasoning_format)
    adapters = check_folders(options.adapters)
    progress("starting vLLM", None)
    _prepare_environment()
    try:
        import torch
        import vllm  # noqa: F401  (fails here, with a message of ours, where it is not installed)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor
    except ImportError as error:
        raise ModelLoadError(f"The vllm engine needs vLLM 0.30 or newer ({error}): {INSTALL}.") from error

    on_cpu = current_platform.is_cpu()
    slots = options.max_num_seqs or (CPU_SLOTS if on_cpu else GPU_SLOTS)
    if on_cpu:
        _place_threads(options, torch)
    arguments: dict[str, Any] = {
        "model": str(folder),
        "load_format": "safetensors",
        "trust_remote_code": False,
        "max_num_seqs": slots,
        "tensor_parallel_size": options.tensor_parallel_size,
        "dtype": options.dtype,
        "enable_prefix_caching": options.enable_prefix_caching,
        "enforce_eager": options.enforce_eager,
        "disable_log_stats": True,
        "seed": secrets.randbits(31),  # of requests without one; vLLM's default would repeat itself after every start
        "use_tqdm_on_load": False,
        # Where a grammar allows any white space, models write nothing else until max_tokens.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
    }
    for field in ("gpu_memory_utilization", "quantization", "max_model_len", "max_num_batched_tokens"):
        if value := getattr(options, field):
            arguments[field] = value
    if adapters:
        arguments |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": _rank(adapters.values())}
    if options.kv_cache_gb:
        arguments["kv_cache_memory_bytes"] = int(options.kv_cache_gb * 1e9)
    try:
        config = EngineArgs(**arguments).create_engine_config()
        if on_cpu and not options.kv_cache_gb:
            config.cache_config.kv_cache_memory_bytes = _cpu_cache_bytes(config, slots)
        # The interface of logits processors that `vllm_penalties` has is that of vLLM's first model runner.
        counts_prefix = not config.use_v2_model_runner
        if counts_prefix:
            config.model_config.logits_processors = ["penstock.engines.vllm.penalties:ContinuedPenalties"]
        progress("loading and compiling the model (up to a minute)", None)
        engine = LLMEngine(config, Executor.get_class(config), log_stats=False)
    except (
        Exception
    ) as error:  # pydantic's, torch's, vLLM's own: whatever it is, it is about this model or these options
        raise ModelLoadError(f"vLLM cannot load {folder}: {_first_line(error)}") from error
    model = config.model_config
    text.context_length = int(model.max_model_len)
    text.vocab_size = min(text.vocab_size, int(model.get_vocab_size()))
    precision = str(model.dtype).removeprefix("torch.")
    if model.quantization:
        precision = f"{model.quantization}/{precision}"
    try:
        core = VLLMCore(engine, counts_prefix, adapters)
    except Exception as error:  # as above
        raise ModelLoadError(f"vLLM cannot load an adapter: {_first_line(error)}") from error
    backend = VLLMBackend(name, text, core, slots, precision, tuple(adapters))
    progress("warming up", None)
    backend.warm_up()
    return backend


#: Ranks that vLLM has room for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def _rank(adapters: Iterable[Path]) -> int:
    """What vLLM must have room for: the largest rank of *adapters*, or the next that it knows."""
    largest = 0
    for folder in adapters:
        config = read_json(folder / CONFIG)
        largest = max(largest, int(config.get("r", 8)), *(config.get("rank_pattern") or {}).values())
    if (rank := next((rank for rank in RANKS if rank >= largest), None)) is None:
        raise ModelLoadError(f"vLLM has room for LoRA adapters of a rank of {RANKS[-1]} at most, not {largest}.")
    return rank


def _prepare_environment() -> None:
    """vLLM reads these when it is imported. What the operator has set stays, but for two that we depend on."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the core in this process
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # it would report this machine to its makers
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # Torch's OpenMP threads wait for each other in a loop, by default for milliseconds, which other processes on these
    # cores pay for (ours: the server). Sleeping at once would cost the engine three quarters of its speed.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def _place_threads(options: VLLMOptions, torch: Any) -> None:
    """Each of several workers gets cores of its own: vLLM would give each a NUMA node, and most machines have one."""
    cores = sorted(os.sched_getaffinity(0))
    cores = cores[: options.threads or len(cores)]
    workers = options.tensor_parallel_size
    if workers == 1:
        torch.set_num_threads(len(cores))
        return
    if workers > len(cores):
        raise ModelLoadError(f"tensor_parallel_size {workers} needs as many cores; there are {len(cores)}.")
    share = len(cores) // workers
    groups = [cores[worker * share : (worker + 1) * share] for worker in range(workers)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, group)) for group in groups))


def _cpu_cache_bytes(config: Any, slots: int) -> int:
    """What *slots* full contexts need, at most a share of the memory (vLLM itself would take nearly all of it)."""
    model, block = config.model_config, config.cache_config.block_size
    token = (
        2
        * model.get_num_layers(config.parallel_config)
        * model.get_num_kv_heads(config.parallel_config)
        * model.get_head_size()
        * model.dtype.itemsize
    )
    blocks = slots * -(-model.max_model_len // block) + 2
    return int(min(token * block * blocks, psutil.virtual_memory().total * CACHE_SHARE))


def _first_line(error: Exception) -> str:
    """Errors of pydantic carry a line per field and a link; those of vLLM may carry a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
