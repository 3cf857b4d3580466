"""lm-evaluation-harness: log-likelihoods and generations over completions and chat, on local tasks.

The model behind knows the answers, so every score has to be perfect.
"""

import json
import os

import pytest
import requests
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

URL, MODEL = os.environ["PENSTOCK_URL"], os.environ["PENSTOCK_MODEL"]
CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Austria": "Vienna"}
QUESTION = "Question: What is the capital of {country}?\nAnswer:"
#: One task for each kind of request that the harness has.
TASKS = {
    "capitals_choice": """
output_type: multiple_choice
doc_to_text: "Question: What is the capital of {{country}}?\\nAnswer:"
doc_to_choice: cities
doc_to_target: gold
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "capitals_say": """
output_type: generate_until
doc_to_text: "Question: What is the capital of {{country}}?\\nAnswer:"
doc_to_target: "{{city}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 16, do_sample: false, temperature: 0.0}
filter_list:
- name: stripped
  filter:
  - {function: regex, regex_pattern: "([A-Z][a-z]+)"}
  - {function: take_first}
metric_list:
- {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "capitals_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "Question: What is the capital of {{country}}?\\nAnswer: {{city}}"
metric_list:
- {metric: word_perplexity}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks, their documents, and a tokenizer that has the server's own ids."""
    folder = tmp_path_factory.mktemp("tasks")
    cities = list(CAPITALS.values())
    rows = [
        {"country": country, "city": city, "cities": cities, "gold": cities.index(city)}
        for country, city in CAPITALS.items()
    ]
    (folder / "capitals.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        where = json.dumps(str(folder / "capitals.json"))
        head = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {where}}}}}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(head + text)
    text = "".join(f"{QUESTION.format(country=country)} {city}\n\n" for country, city in CAPITALS.items())
    told = requests.post(f"{URL}/tokenize", json={"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    vocabulary = dict(zip(told["token_strs"], told["tokens"], strict=True))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="\n"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\s|[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="\n", eos_token="\n").save_pretrained(
        folder / "tokens"
    )
    return folder


def score(folder, model, route, task, **options):
    arguments = {"model": MODEL, "base_url": f"{URL}/v1/{route}", "num_concurrent": 2, "max_retries": 1, **options}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    chat = model == "local-chat-completions"
    results = simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=manager, apply_chat_template=chat, batch_size=2
    )
    return next(value for name, value in results["results"][task].items() if "stderr" not in name and "," in name)


def completions(folder, task, **options):
    tokens = {"tokenizer_backend": "huggingface", "tokenizer": str(folder / "tokens"), "max_length": 2048}
    return score(folder, "local-completions", "completions", task, **tokens, **options)


@pytest.mark.parametrize("by_ids", [True, False], ids=["ids", "text"])
def test_the_likelihoods_of_choices(folder, by_ids):
    assert completions(folder, "capitals_choice", tokenized_requests=by_ids) == 1.0


@pytest.mark.parametrize("by_ids", [True, False], ids=["ids", "text"])
def test_the_likelihood_of_a_text(folder, by_ids):
    assert 1 < completions(folder, "capitals_text", tokenized_requests=by_ids) < 100


@pytest.mark.parametrize("by_ids", [True, False], ids=["ids", "text"])
def test_completions(folder, by_ids):
    assert completions(folder, "capitals_say", tokenized_requests=by_ids) == 1.0


def test_chats(folder):
    assert score(folder, "local-chat-completions", "chat/completions", "capitals_say") == 1.0
