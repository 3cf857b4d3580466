"""An engine that somebody else has written, as an installed package: `install` puts it into a folder for the path."""

from __future__ import annotations

from pathlib import Path

FILES = {
    "parrot/__init__.py": """
import msgspec

from penstock.core.errors import ModelLoadError
from penstock.engines.options import Positive
from penstock.engines.plugin import Plugin


class ParrotOptions(msgspec.Struct, frozen=True):
    slots: Positive = 8


def check(name, path, options):
    if path is not None:
        raise ModelLoadError(f"Parrots have no files: leave {path} out.")


PLUGIN = Plugin(load="parrot.backend:load", options=ParrotOptions, check=check)
""",
    "parrot/backend.py": '''
"""Says the words of the prompt, again and again."""

from penstock.core.errors import ContextLengthExceeded
from penstock.core.ports import ModelInfo
from penstock.engines.child.backend import Backend
from penstock.engines.child.choices import Choices

CONTEXT = 100_000
UNSUPPORTED = (
    "bad_words", "logit_bias", "logprobs", "min_tokens", "response_format", "seed", "stop", "stop_token_ids", "tools"
)


class Parrot(Backend):
    def __init__(self, name, slots):
        self.slots = slots
        self.info = ModelInfo(
            name=name, engine="parrot", context_length=CONTEXT, deterministic=True, unsupported=UNSUPPORTED
        )
        self.requests = {}

    def add(self, key, request, prefixes, attempt):
        text = request.prompt or " ".join(message.content for message in request.messages or ())
        words = list(request.prompt_ids or ()) or text.split()
        if len(words) >= CONTEXT:
            param = "prompt" if request.messages is None else "messages"
            raise ContextLengthExceeded.of(param, len(words), CONTEXT)
        said = [len(prefix.ids) for prefix in prefixes]
        self.requests[key] = (Choices(key, len(said), len(words)), said, request.sampling.max_tokens, words)

    def abort(self, key):
        self.requests.pop(key, None)

    @property
    def busy(self):
        return bool(self.requests)

    def step(self):
        outputs = [self.say(*request) for request in self.requests.values()]
        for output in outputs:
            if output.finish is not None:
                del self.requests[output.key]
        return outputs

    def say(self, choices, said, most, words):
        output, last = None, None
        for choice, count in enumerate(said):
            ids, texts = [], []
            if count < most:
                ids, texts = [count], [f"{words[count % len(words)]} "]
                said[choice] += 1
            now = choices.output(choice, ids, texts)
            if output is None:
                output = now
            else:
                output.extend(now)
        if min(said) >= most:
            for choice in range(len(said)):
                last = choices.end(choice, "length")
            output.extend(last)
        return output


def load(name, path, options, progress):
    progress("waking the parrot", 0.5)
    return Parrot(name, options.slots)
''',
    "parrot-1.0.dist-info/METADATA": "Metadata-Version: 2.4\nName: parrot\nVersion: 1.0\n",
    "parrot-1.0.dist-info/entry_points.txt": "[penstock.engines]\nparrot = parrot:PLUGIN\n",
}


def install(folder: Path) -> Path:
    """The package ``parrot``, with the engine of this name, in *folder*, which is then to be put on the path."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
