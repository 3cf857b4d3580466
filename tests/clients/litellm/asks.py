"""LiteLLM: its SDK on every dialect, and its proxy between a client and Penstock."""

import asyncio
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time

import anthropic
import httpx
import litellm
import openai
import pytest

URL, MODEL, EMBED = (os.environ[f"PENSTOCK_{name}"] for name in ("URL", "MODEL", "EMBED"))
#: Of the proxy, which does not start without one.
KEY = f"sk-{secrets.token_hex(32)}"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "user",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
    },
}
PROVIDERS = {
    "openai": {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1"},
    "hosted_vllm": {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1"},
    "responses": {"model": f"openai/responses/{MODEL}", "api_base": f"{URL}/v1"},
    "anthropic": {"model": f"anthropic/{MODEL}", "api_base": URL},
}


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(params=PROVIDERS)
def complete(request):
    def call(text, **options):
        messages = user(text) if isinstance(text, str) else text
        return litellm.completion(
            messages=messages, api_key="none", num_retries=0, max_retries=0, **PROVIDERS[request.param], **options
        )

    return call


def test_a_text(complete):
    reply = complete("Say 'good morning'.", temperature=0, max_tokens=50)
    assert reply.choices[0].message.content == "good morning"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens > 0
    assert reply.usage.completion_tokens > 0


def test_a_text_as_it_comes(complete):
    chunks = list(complete("Say 'one two three'.", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two three"
    assert any(getattr(chunk, "usage", None) for chunk in chunks)


def test_a_tool_and_what_is_made_of_its_result(complete):
    message = complete("What is the weather in Paris?", tools=TOOLS).choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}')
    history = [
        *user("What is the weather in Paris?"),
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert complete(history, tools=TOOLS).choices[0].message.content == "The tool says: sunny"


def test_a_tool_in_a_stream(complete):
    chunks = list(complete("What is the weather in Paris?", tools=TOOLS, tool_choice="required", stream=True))
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"city": "Paris"}'


def test_a_structure(complete):
    reply = complete("Extract: Jason is 25 years old.", response_format=SCHEMA)
    assert reply.choices[0].message.content == '{"name": "Jason", "age": 25}'


def test_a_prompt_that_is_too_long_is_known_as_such(complete):
    with pytest.raises(litellm.ContextWindowExceededError):
        complete("word " * 70_000)


def test_a_bad_request_is_none_of_the_context(complete):
    with pytest.raises(litellm.BadRequestError) as caught:
        complete("Hi", temperature=17)
    assert not isinstance(caught.value, litellm.ContextWindowExceededError)


def test_several_choices_and_log_probabilities():
    options = {**PROVIDERS["openai"], "api_key": "none"}
    reply = litellm.completion(messages=user("Say 'one two'."), n=2, logprobs=True, top_logprobs=2, **options)
    assert [choice.message.content for choice in reply.choices] == ["one two", "one two"]
    assert [each.token for each in reply.choices[0].logprobs.content] == ["one", " two"]


def test_a_completion():
    reply = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="Q: What is 2 + 3? A:", api_base=f"{URL}/v1", api_key="none"
    )
    assert "5" in reply.choices[0].text


def test_the_responses_api():
    reply = litellm.responses(
        model=f"openai/{MODEL}", input="Say 'good morning'.", api_base=f"{URL}/v1", api_key="none"
    )
    assert reply.output[0].content[0].text == "good morning"


def test_the_responses_api_as_it_comes():
    events = list(
        litellm.responses(
            model=f"openai/{MODEL}", input="Say 'one two'.", stream=True, api_base=f"{URL}/v1", api_key="none"
        )
    )
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "one two"


def test_a_response_is_fetched_and_deleted():
    where = {"api_base": f"{URL}/v1", "api_key": "none", "custom_llm_provider": "openai"}
    made = litellm.responses(model=f"openai/{MODEL}", input="Say 'one'.", api_base=f"{URL}/v1", api_key="none")
    assert litellm.get_responses(response_id=made.id, **where).output[0].content[0].text == "one"
    assert litellm.delete_responses(response_id=made.id, **where).deleted


@pytest.mark.parametrize("provider", ["anthropic", "openai"])
def test_anthropics_messages(provider):
    message = asyncio.run(
        litellm.anthropic.messages.acreate(
            model=PROVIDERS[provider]["model"], api_base=PROVIDERS[provider]["api_base"], api_key="none",
            max_tokens=50, messages=user("Say 'good morning'."),
        )
    )  # fmt: skip
    assert message["content"][0]["text"] == "good morning"
    assert message["stop_reason"] == "end_turn"


def test_embeddings():
    reply = litellm.embedding(model=f"openai/{EMBED}", input=["a fox", "a river"], api_base=f"{URL}/v1", api_key="none")
    assert [len(each["embedding"]) for each in reply.data] == [64, 64]


# ------------------------------------------------------------------------------------------ the proxy


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """Its address; it has the model under each provider's name."""
    folder = tmp_path_factory.mktemp("proxy")
    lines = ["model_list:"]
    for name, options in PROVIDERS.items():
        lines += [f"- model_name: by-{name}", "  litellm_params:", "    api_key: none"]
        lines += [f"    {key}: {value}" for key, value in options.items()]
    lines += ["- model_name: vectors", "  litellm_params:", f"    model: openai/{EMBED}", "    api_key: none"]
    lines += [f"    api_base: {URL}/v1", "litellm_settings:", "  num_retries: 0", "  telemetry: false"]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    litellm_command = os.path.join(os.path.dirname(sys.executable), "litellm")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [litellm_command, "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY},
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(1200):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health/liveliness", trust_env=False).status_code == 200:
                    break
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def through(proxy):
    return openai.OpenAI(base_url=f"{proxy}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(params=PROVIDERS)
def model(request):
    return f"by-{request.param}"


def test_a_text_through_the_proxy(through, model):
    reply = through.chat.completions.create(model=model, messages=user("Say 'good morning'."))
    assert reply.choices[0].message.content == "good morning"
    assert reply.usage.completion_tokens > 0


def test_a_stream_through_the_proxy(through, model):
    chunks = list(through.chat.completions.create(model=model, messages=user("Say 'one two three'."), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two three"


def test_a_tool_through_the_proxy(through, model):
    reply = through.chat.completions.create(model=model, messages=user("What is the weather in Paris?"), tools=TOOLS)
    assert reply.choices[0].message.tool_calls[0].function.arguments == '{"city": "Paris"}'


def test_a_prompt_that_is_too_long_through_the_proxy(through, model):
    with pytest.raises(openai.BadRequestError) as caught:
        through.chat.completions.create(model=model, messages=user("word " * 70_000))
    assert "ContextWindowExceededError" in str(caught.value)


@pytest.mark.parametrize("name", ["by-openai", "by-anthropic"])
def test_anthropics_sdk_through_the_proxy(proxy, name):
    client = anthropic.Anthropic(base_url=proxy, api_key=KEY, max_retries=0)
    message = client.messages.create(model=name, max_tokens=50, messages=user("Say 'good morning'."))
    assert message.content[0].text == "good morning"


@pytest.mark.parametrize("name", ["by-openai", "by-anthropic"])
def test_a_stream_of_anthropics_sdk_through_the_proxy(proxy, name):
    client = anthropic.Anthropic(base_url=proxy, api_key=KEY, max_retries=0)
    tool = {"name": "weather", "description": "Weather", "input_schema": TOOLS[0]["function"]["parameters"]}
    asked = user("What is the weather in Paris?")
    with client.messages.stream(model=name, max_tokens=50, messages=asked, tools=[tool]) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    assert [block.input for block in message.content if block.type == "tool_use"] == [{"city": "Paris"}]


@pytest.mark.parametrize("name", ["by-openai", "by-hosted_vllm"])
def test_the_responses_api_through_the_proxy(through, name):
    with through.responses.stream(model=name, input="Say 'one two three'.") as stream:
        response = stream.get_final_response()
    assert response.output_text == "one two three"


def test_embeddings_through_the_proxy(through):
    reply = through.embeddings.create(model="vectors", input=["a fox", "a river"])
    assert [len(each.embedding) for each in reply.data] == [64, 64]
